"""The playground: next-token probabilities of a run or another model, before and after each sampling parameter.

It runs on the CPU, one request at a time, and samples exactly as `llm.generate` does: with the same functions of the
same logits. Shapes: T time, V vocabulary.
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.errors import UserError
from llm.page.follow import MODEL, WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor

    from llm.arch import Model
    from llm.tokens.tokenizer import Tokenizer

PROMPT = 20_000  # characters, at most
TOKENS = 2_000  # after the prompt, at most
STOPS = 20  # stop texts, at most, and of at most PROMPT characters together
CANDIDATES = 20  # likely tokens in an answer


@dataclass(frozen=True)
class Question:
    """A request of the page: a prompt, the tokens generated after it so far, and the sampling parameters."""

    prompt: str
    ids: list[int]
    weights: str
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    stop: list[str]  # texts before which a continuation ends
    seed: int
    count: int  # tokens to generate


def parse_question(body: bytes) -> Question:
    """Return the question in the body of a request.

    Raises:
        UserError: the body is not JSON, or a field is out of its range; the message names the field.
    """
    from llm.generate import check_knobs, check_stop

    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise UserError("the request is not JSON") from None
    if not isinstance(given, dict):
        raise UserError("the request is not a JSON object")
    prompt = given.get("prompt", "")
    ids = given.get("ids", [])
    weights = given.get("weights", "last")
    if not isinstance(prompt, str) or not 0 < len(prompt) <= PROMPT:
        raise UserError(f"prompt: give 1 to {PROMPT:,} characters")
    if not isinstance(ids, list) or len(ids) > TOKENS or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise UserError(f"ids: expected at most {TOKENS:,} token ids; start over")
    if weights not in (*WEIGHTS, MODEL):
        raise UserError(f"weights: expected last or best, or {MODEL} for what is no run")
    stop = given.get("stop", [])
    if not isinstance(stop, list) or len(stop) > STOPS or not all(isinstance(text, str) for text in stop):
        raise UserError(f"stop: expected at most {STOPS} texts")
    if sum(map(len, stop)) > PROMPT:
        raise UserError(f"stop: expected at most {PROMPT:,} characters")
    check_stop(stop)
    top_k = None if given.get("top_k") is None else _integer(given, "top_k", 1, 2**31)
    temperature = _number(given, "temperature", 1.0)
    top_p = _number(given, "top_p", 1.0)
    min_p = _number(given, "min_p", 0.0)
    repetition_penalty = _number(given, "repetition_penalty", 1.0)
    check_knobs(0, temperature, top_k, top_p, min_p, repetition_penalty)
    return Question(
        prompt,
        ids,
        weights,
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        stop,
        seed=_integer(given, "seed", 0, 2**53, 1337),
        count=_integer(given, "count", 0, TOKENS, 1),
    )


def _number(given: dict[str, Any], name: str, default: float) -> float:
    value = given.get(name, default)
    if type(value) not in (int, float) or not abs(value) < 1e9:
        raise UserError(f"{name}: expected a number")
    return float(value)


def _integer(given: dict[str, Any], name: str, low: int, high: int, default: int = 1) -> int:
    value = given.get(name, default)
    if type(value) is not int or not low <= value <= high:
        raise UserError(f"{name}: expected a whole number from {low} to {high:,}")
    return value


@dataclass
class Playground:
    """Answers questions. It keeps the last model until another is requested or its file changes."""

    _key: tuple[Any, ...] = ()
    _model: "Model | None" = None
    _tokenizer: "Tokenizer | None" = None

    def load(self, path: Path, weights: str) -> tuple["Model", "Tokenizer"]:
        """Return model and tokenizer of a run, or of a file or folder that is no run.

        Raises:
            UserError: there are no such weights, or they cannot be read.
        """
        import torch

        from llm.config import GPTConfig
        from llm.run import Run
        from llm.tokens.bpe import gpt2
        from llm.weights import open_weights

        file = path if weights == MODEL else path / WEIGHTS[weights]
        try:
            found = file.stat()
        except OSError:
            raise UserError(f"{file.name}: not saved yet; the run saves it at an evaluation") from None
        key = (file, found.st_mtime_ns, found.st_size, found.st_ino)
        if key != self._key or self._model is None or self._tokenizer is None:
            self._key = ()
            self._model = None  # free the memory of the old model first
            torch.set_num_threads(1)  # leave the other cores to the training
            if weights == MODEL:
                opened = open_weights(str(path), GPTConfig())
                self._tokenizer = opened.tokenizer or gpt2()
                self._model = opened.model(torch.device("cpu"))
            else:
                run = Run.open(path)
                self._tokenizer = run.tokenizer
                self._model = run.model(weights, "cpu")
            self._key = key
        return self._model, self._tokenizer

    def next(self, path: Path, asked: Question) -> dict[str, Any]:
        """Return the most likely next tokens, each with its probability before and after the sampling parameters."""
        import torch

        from llm.generate import penalise, tokens_in

        model, tokenizer = self.load(path, asked.weights)
        ids = context(tokenizer, asked)
        with torch.no_grad():
            logits = next(logits_after(model, ids, tokenizer.vocab_size))
        weighed = penalise(logits, tokens_in(ids, tokenizer.vocab_size), asked.repetition_penalty)
        return {"likely": likely(logits, weighed, asked, tokenizer), **knob_counts(logits, weighed, asked)}

    def stream(self, path: Path, asked: Question) -> Iterator[dict[str, Any]]:
        """Yield tokens as they are generated, each with the likely alternatives in its place.

        The last is end-of-text, or the one that completes a stop text: its "cut" is what the page then takes off the
        end of the text. An end among the tokens generated before has been passed; the next is looked for behind it.

        Directly after the prompt they are those that `losscurve sample` generates with this seed. After earlier tokens,
        the seed is derived from the seed and the number of these tokens, so that single steps do not repeat a draw.
        """
        import torch

        from llm.generate import candidates, penalise, tokens_in
        from llm.tokens.writing import Writing

        model, tokenizer = self.load(path, asked.weights)
        generator = torch.Generator()
        seed = asked.seed
        if asked.ids:
            seed = (asked.seed * 1_000_003 + len(asked.ids)) % 2**63
        generator.manual_seed(seed)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(tokenizer.decode_bytes(asked.ids))  # they may end inside a character
        writing = Writing(tokenizer, asked.stop)
        for token_id in asked.ids:
            writing.add(token_id)
            if writing.ended:
                writing.go_on()
        context_ids = context(tokenizer, asked)
        seen = tokens_in(context_ids, tokenizer.vocab_size)
        logits_stream = logits_after(model, context_ids, tokenizer.vocab_size)
        with torch.no_grad():
            logits = next(logits_stream)
        for _ in range(asked.count):
            with torch.no_grad():
                weighed = penalise(logits, seen, asked.repetition_penalty)
                probabilities, ids = candidates(weighed, asked.temperature, asked.top_k, asked.top_p, asked.min_p)
                drawn = torch.multinomial(probabilities, 1, generator=generator)
                token = drawn if ids is None else ids.gather(1, drawn)
                token_id = int(token.item())
                writing.add(token_id)
                yield {
                    "id": token_id,
                    "text": decoder.decode(tokenizer.decode_bytes([token_id])),
                    "likely": likely(logits, weighed, asked, tokenizer, token_id),
                    "cut": writing.cut,
                }
                if writing.ended:
                    return
                seen[0, token_id] = True
                logits = logits_stream.send(token)


def context(tokenizer: "Tokenizer", asked: Question) -> "Tensor":
    """Return the token ids (1, T) of the prompt and of the tokens generated after it.

    Raises:
        UserError: the prompt has no token, or an id is not one of this run's.
    """
    import torch

    from llm.tokens.tokenizer import encode_prompt

    prompt = encode_prompt(tokenizer, asked.prompt).tolist()
    if any(i >= tokenizer.vocab_size for i in asked.ids):
        raise UserError("ids: not tokens of this run; start over")
    return torch.tensor([prompt + asked.ids], dtype=torch.int64)


def logits_after(model: "Model", ids: "Tensor", vocab_size: int) -> Any:
    """Return a generator of logits (1, V): those after `ids` (1, T), then those after each token (1, 1) sent to it.

    Like `generate`, it uses a key/value cache until the context is full.
    """
    import torch

    from llm.generate import last_logits
    from llm.model import KVCache

    limit = model.config.block_size
    past = ids[:, -limit:]  # the context
    new = past  # the tokens that are not in the cache
    cache = KVCache(model.config, 1, ids.device, model.wte.weight.dtype)
    while True:
        with torch.no_grad():
            fits = model.cache_slides or cache.length + new.size(1) <= limit
            hidden = model.hidden(new, cache) if fits else model.hidden(past)
            logits = last_logits(model, hidden)[:, :vocab_size]
        new = yield logits
        past = torch.cat([past, new], 1)[:, -limit:]


def likely(
    logits: "Tensor", weighed: "Tensor", asked: Question, tokenizer: "Tokenizer", drawn: int | None = None
) -> list[dict[str, Any]]:
    """Return the CANDIDATES most likely tokens of logits (1, V), and the one `drawn`, with their probabilities.

    There is one probability before the sampling parameters, and one after each of them in turn. `weighed` (1, V) are
    the logits after the repetition penalty.
    """
    import torch

    from llm.generate import next_probabilities

    before = torch.softmax(logits.float(), 1)
    stages = {
        "before": before,
        "temperature": next_probabilities(weighed, asked.temperature),
        "top_k": next_probabilities(weighed, asked.temperature, asked.top_k),
        "after": next_probabilities(weighed, asked.temperature, asked.top_k, asked.top_p, asked.min_p),
    }
    ids = before[0].topk(min(CANDIDATES, before.size(1))).indices.tolist()
    ids += [drawn] if drawn is not None and drawn not in ids else []
    return [
        {"id": i, "text": tokenizer.decode([i])}
        | {name: probability[0, i].item() for name, probability in stages.items()}
        for i in ids
    ]


def knob_counts(logits: "Tensor", weighed: "Tensor", asked: Question) -> dict[str, Any]:
    """Return how many tokens of the vocabulary can be drawn, and the entropy (nats) before and after the parameters."""
    import torch

    from llm.generate import next_probabilities

    after = next_probabilities(weighed, asked.temperature, asked.top_k, asked.top_p, asked.min_p)
    before = torch.softmax(logits.float(), 1)
    entropies = [float(-torch.special.xlogy(p, p).sum()) for p in (before, after)]
    return {"possible": int((after > 0).sum()), "vocab_size": after.size(1), "entropy": entropies}
