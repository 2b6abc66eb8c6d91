"""The next token of a prompt, before and after each knob, by a run's saved weights. On the CPU, one at a time.

What is drawn from is what `llm.generate` draws from: the same functions, of the same logits. V vocabulary.
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.errors import UserError
from llm.page.follow import WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor

    from llm.model import GPT
    from llm.tokens.tokenizer import Tokenizer

PROMPT = 20_000  # characters
TOKENS = 2_000  # that follow the prompt, at most
SHOWN = 20  # candidates


@dataclass(frozen=True)
class Question:
    """What the page asks: a prompt, the tokens drawn after it so far, and the knobs."""

    prompt: str
    ids: list[int]
    weights: str
    temperature: float
    top_k: int | None
    top_p: float
    seed: int
    count: int  # tokens to draw


def question(body: bytes) -> Question:
    """What a request's body asks. Raises UserError naming the field that is out of its range."""
    from llm.generate import check_knobs

    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise UserError("the request is not JSON") from None
    if not isinstance(given, dict):
        raise UserError("the request is not a JSON object")
    prompt, ids, weights = given.get("prompt", ""), given.get("ids", []), given.get("weights", "last")
    if not isinstance(prompt, str) or not 0 < len(prompt) <= PROMPT:
        raise UserError(f"prompt: give 1 to {PROMPT:,} characters")
    if not isinstance(ids, list) or len(ids) > TOKENS or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise UserError(f"ids: expected at most {TOKENS:,} tokens; start anew")
    if weights not in tuple(WEIGHTS):
        raise UserError("weights: expected last or best")
    top_k = None if given.get("top_k") is None else whole(given, "top_k", 1, 2**31)
    temperature, top_p = number(given, "temperature", 1.0), number(given, "top_p", 1.0)
    check_knobs(0, temperature, top_k, top_p)
    seed, count = whole(given, "seed", 0, 2**53, 1337), whole(given, "count", 0, TOKENS, 1)
    return Question(prompt, ids, weights, temperature, top_k, top_p, seed, count)


def number(given: dict[str, Any], name: str, default: float) -> float:
    value = given.get(name, default)
    if type(value) not in (int, float) or not abs(value) < 1e9:
        raise UserError(f"{name}: expected a number")
    return float(value)


def whole(given: dict[str, Any], name: str, low: int, high: int, default: int = 1) -> int:
    value = given.get(name, default)
    if type(value) is not int or not low <= value <= high:
        raise UserError(f"{name}: expected a whole number from {low} to {high:,}")
    return value


@dataclass
class Playground:
    """The model last asked for, kept until another is, or until its file is written anew."""

    _key: tuple[Any, ...] = ()
    _model: "GPT | None" = None
    _tokenizer: "Tokenizer | None" = None

    def opened(self, path: Path, weights: str) -> tuple["GPT", "Tokenizer"]:
        """Model and tokenizer of a run. Raises UserError where it has no such weights, or cannot be read."""
        import torch

        from llm.run import Run

        file = path / WEIGHTS[weights]
        try:
            found = file.stat()
        except OSError:
            raise UserError(f"{WEIGHTS[weights]}: not saved yet; the first save comes with an evaluation") from None
        key = (file, found.st_mtime_ns, found.st_size, found.st_ino)
        if key != self._key or self._model is None or self._tokenizer is None:
            self._key, self._model = (), None  # the old one's memory goes first
            torch.set_num_threads(1)  # the others are the training's
            run = Run.open(path)
            self._tokenizer, self._model = run.tokenizer, run.model(weights, "cpu")
            self._key = key
        return self._model, self._tokenizer

    def next(self, path: Path, asked: Question) -> dict[str, Any]:
        """The likeliest next tokens, each with its probability before and after the knobs."""
        import torch

        model, tokenizer = self.opened(path, asked.weights)
        with torch.no_grad():
            logits = next(logits_after(model, context(tokenizer, asked), tokenizer.vocab_size))
        return {"likely": likely(logits, asked, tokenizer), **knob_counts(logits, asked)}

    def stream(self, path: Path, asked: Question) -> Iterator[dict[str, Any]]:
        """Tokens as they are drawn, each with what else was likely there.

        From the prompt on they are those that `losscurve sample` draws with this seed; tokens after some drawn before
        are drawn with a seed of their own (the seed and how many there are), so that stepping does not repeat itself.
        """
        import torch

        from llm.generate import candidates

        model, tokenizer = self.opened(path, asked.weights)
        luck = torch.Generator()
        luck.manual_seed(asked.seed if not asked.ids else (asked.seed * 1_000_003 + len(asked.ids)) % 2**63)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(tokenizer.decode_bytes(asked.ids))  # a character may be under way
        rows = logits_after(model, context(tokenizer, asked), tokenizer.vocab_size)
        with torch.no_grad():
            logits = next(rows)
        for _ in range(asked.count):
            with torch.no_grad():
                probabilities, ids = candidates(logits, asked.temperature, asked.top_k, asked.top_p)
                drawn = torch.multinomial(probabilities, 1, generator=luck)
                token = drawn if ids is None else ids.gather(1, drawn)
                number = int(token.item())
                shown = likely(logits, asked, tokenizer, number)
                yield {"id": number, "text": decoder.decode(tokenizer.decode_bytes([number])), "likely": shown}
                logits = rows.send(token)


def context(tokenizer: "Tokenizer", asked: Question) -> "Tensor":
    """The token ids (1, T) of the prompt and of what was drawn after it. Raises UserError."""
    import torch

    prompt = tokenizer.encode(asked.prompt).tolist()
    if any(i >= tokenizer.vocab_size for i in asked.ids):
        raise UserError("ids: not tokens of this run; start anew")
    if not prompt:
        raise UserError("prompt: holds no token; give at least one character")
    return torch.tensor([prompt + asked.ids], dtype=torch.int64)


def logits_after(model: "GPT", ids: "Tensor", vocab_size: int) -> Any:
    """A generator of logits (1, V): those after `ids` (1, T), then those after each token (1, 1) sent to it.

    With a key/value cache while the context fits, as `generate` does.
    """
    import torch

    from llm.generate import last_logits
    from llm.model import KVCache

    limit = model.config.block_size
    past = new = ids[:, -limit:]
    cache = KVCache(model.config, 1, ids.device, model.wte.weight.dtype)
    while True:
        with torch.no_grad():
            hidden = model.hidden(new, cache) if cache.length + new.size(1) <= limit else model.hidden(past)
            logits = last_logits(model, hidden)[:, :vocab_size]
        new = yield logits
        past = torch.cat([past, new], 1)[:, -limit:]


def likely(logits: "Tensor", asked: Question, tokenizer: "Tokenizer", drawn: int | None = None) -> list[dict[str, Any]]:
    """The `SHOWN` likeliest tokens of logits (1, V), and the one `drawn`: before the knobs, and after each in turn."""
    import torch

    from llm.generate import next_probabilities

    before = torch.softmax(logits.float(), 1)
    stages = {
        "before": before,
        "temperature": next_probabilities(logits, asked.temperature),
        "top_k": next_probabilities(logits, asked.temperature, asked.top_k),
        "after": next_probabilities(logits, asked.temperature, asked.top_k, asked.top_p),
    }
    ids = before[0].topk(min(SHOWN, before.size(1))).indices.tolist()
    ids += [drawn] if drawn is not None and drawn not in ids else []
    return [
        {"id": i, "text": tokenizer.decode([i])}
        | {name: probability[0, i].item() for name, probability in stages.items()}
        for i in ids
    ]


def knob_counts(logits: "Tensor", asked: Question) -> dict[str, Any]:
    """How many tokens can be drawn, of how many, and the distribution's entropy (nats) before and after."""
    import torch

    from llm.generate import next_probabilities

    after = next_probabilities(logits, asked.temperature, asked.top_k, asked.top_p)
    before = torch.softmax(logits.float(), 1)
    entropies = [float(-torch.special.xlogy(p, p).sum()) for p in (before, after)]
    return {"possible": int((after > 0).sum()), "vocab_size": after.size(1), "entropy": entropies}
