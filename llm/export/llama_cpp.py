"""The proof by llama.cpp: what it makes of a GGUF file, compared with the run.

Its HTTP server tells the probabilities of the likeliest next tokens, not all logits; so log-probabilities are compared.

Shapes: T tokens of a window, V vocabulary of the model.
"""

import http.client
import json
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm.errors import Failure, UserError
from llm.export.proof import Proof, compare_ids, hostile_texts, validation_text
from llm.export.source import Source
from llm.generate import generate
from llm.machine.interpreter import child_environment
from llm.tokens.tokenizer import Ids

LIKELIEST = 512  # tokens whose log-probabilities are compared at each position
POSITIONS = 256  # of the validation text, and as many of the hostile text, at least
CONTINUED = 64  # tokens of the greedy continuation
WAIT = 600  # seconds for an answer
FORCE = 1e6  # added to a logit, it makes llama.cpp draw that token


def is_installed() -> bool:
    return util.find_spec("xllamacpp") is not None


class LlamaCpp:
    """llama.cpp's HTTP server with one model."""

    def __init__(self, address: str) -> None:
        parts = urllib.parse.urlsplit(address)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=WAIT)

    def close(self) -> None:
        self._connection.close()

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request of llama.cpp's HTTP API. Raises UserError with its reason if it refuses."""
        self._connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        content = json.loads(response.read())
        if response.status != 200:
            raise UserError(f"llama.cpp refuses {path[1:]}: {content['error']['message']}; nothing was written")
        return content  # type: ignore[no-any-return]

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, in which `<|endoftext|>` is ordinary text; with what llama.cpp puts before it."""
        body = {"content": text, "parse_special": False, "add_special": True}
        return self.ask("/tokenize", body)["tokens"]  # type: ignore[no-any-return]

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`."""
        return self.ask("/detokenize", {"tokens": ids})["content"]  # type: ignore[no-any-return]

    def next_tokens(self, ids: Sequence[int], count: int, forced: int) -> tuple[dict[int, float], float]:
        """Return the log-probabilities of the `count` likeliest tokens after `ids`, and that of the token `forced`.

        `forced` is a token of whole characters: llama.cpp keeps others back until the character is complete.
        """
        knobs = {"n_predict": 1, "n_probs": count, "logit_bias": [[forced, FORCE]], "samplers": []}
        (found,) = self.ask("/completion", {"prompt": list(ids), **knobs})["completion_probabilities"]
        assert found["id"] == forced
        return {token["id"]: token["logprob"] for token in found["top_logprobs"]}, found["logprob"]

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """Return the tokens that llama.cpp appends to `ids`, `count` of them if it draws no end-of-text."""
        knobs = {"n_predict": count, "temperature": 0, "return_tokens": True}
        return self.ask("/completion", {"prompt": list(ids), **knobs})["tokens"]  # type: ignore[no-any-return]


@contextmanager
def llama_cpp(path: Path) -> Iterator[LlamaCpp]:
    """Yield llama.cpp with the model of a GGUF file. Raises UserError if it does not load."""
    command = [sys.executable, "-m", "llm.export.llama_server", str(path), str(torch.get_num_threads())]
    environment = child_environment() | {"GGML_NO_BACKTRACE": "1"}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            if not address:
                raise UserError(f"llama.cpp does not load the file ({_cause(log)}); nothing was written")
            with closing(LlamaCpp(address)) as reader:
                yield reader
        except (OSError, http.client.HTTPException) as error:
            raise Failure(f"llama.cpp stopped ({_cause(log) or error}); nothing was written") from None
        finally:
            process.stdin.close()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def _cause(log: Any) -> str:
    """Return the last line of llama.cpp's log that names an error."""
    log.seek(0)
    lines = [line.strip() for line in log.read().decode("utf-8", errors="replace").splitlines()]
    errors = [line for line in lines if " E " in line or "rror" in line or "ASSERT" in line]
    return errors[-1] if errors else ""


@dataclass(frozen=True)
class LlamaCppProof:
    """The figures of a comparison that found no mismatch. It prints as three lines."""

    proof: Proof
    continued: int  # tokens of the greedy continuation that was compared
    equal: int  # of them, before the first that differs

    def __str__(self) -> str:
        end = "all equal" if self.equal == self.continued else f"the first {self.equal} equal"
        return f"{self.proof}\ngreedy continuation of {self.continued} tokens: {end}"


def prove_by_llama_cpp(source: Source, path: Path, bound: float) -> LlamaCppProof:
    """Compare what llama.cpp makes of the file `path` with the run, and return the figures.

    `bound` is the largest difference of a log-probability that is allowed, as a share of the largest logit.
    Raises UserError if an id differs, a log-probability is beyond the bound, or llama.cpp refuses the file.
    """
    tokenizer = source.tokenizer
    block_size = source.model.config.block_size
    hostile = hostile_texts(tokenizer)
    with llama_cpp(path) as reader:
        text = validation_text(source)
        validation_tokens = compare_ids(tokenizer, reader.encode, reader.decode, text) if text else 0
        hostile_tokens = sum(compare_ids(tokenizer, reader.encode, reader.decode, words) for words in hostile)
        comparison = _Comparison(source, reader, bound)
        comparison.add_text(source.validation)
        losses = comparison.losses()
        comparison.add_text(tokenizer.encode(hostile[-1]))
        start = [*source.validation[:8], *tokenizer.encode(hostile[-1])[:8]][: max(1, block_size // 2)]
        continued = _continue(source, reader, [int(token) for token in start])
    proof = Proof(
        f"llama.cpp (xllamacpp {metadata.version('xllamacpp')})",
        validation_tokens,
        hostile_tokens,
        comparison.positions,
        comparison.difference,
        bound,
        *losses,
        compared=f"log-probabilities of the {min(LIKELIEST, source.model.config.vocab_size)} likeliest tokens",
    )
    return LlamaCppProof(proof, *continued)


class _Comparison:
    """The comparison of log-probabilities so far."""

    def __init__(self, source: Source, reader: LlamaCpp, bound: float) -> None:
        self._model = source.model
        self._reader = reader
        self._bound = bound
        self._count = min(LIKELIEST, source.model.config.vocab_size)
        self._whole = _whole_tokens(source)
        self.positions = 0
        self.difference = 0.0
        self._nats: list[tuple[float, float]] = []  # the run's and llama.cpp's, of one token

    def add_text(self, ids: Ids) -> None:
        """Compare POSITIONS positions of a text or more: all but the last of a window, or POSITIONS of a long one."""
        T = self._model.config.block_size
        windows = -(-POSITIONS // (T - 1))
        for start in range(0, min(len(ids) - 1, windows * T), T):
            self._add_window(ids[start : start + T].tolist())

    @torch.no_grad()
    def _add_window(self, window: list[int]) -> None:
        logits = self._model(torch.tensor([window]))[0][0].float()  # (T, V)
        scale = max(1.0, logits.abs().max().item())
        ours = torch.log_softmax(logits, 1)
        for length in np.unique(np.linspace(1, len(window) - 1, POSITIONS, dtype=int)).tolist():
            following = window[length]
            is_whole = following in self._whole
            forced = following if is_whole else next(iter(self._whole))
            theirs, nats = self._reader.next_tokens(window[:length], self._count, forced)
            expected = ours[length - 1, list(theirs)]
            difference = (torch.tensor(list(theirs.values())) - expected).abs().max().item() / scale
            if not difference <= self._bound:  # NaN is beyond any bound
                raise UserError(
                    f"llama.cpp's log-probabilities differ from the run's by {difference:.2g} of the largest logit "
                    f"({scale:.3g}), and the bound is {self._bound:.2g}; nothing was written"
                )
            self.positions += 1
            self.difference = max(self.difference, difference)
            if is_whole:
                self._nats.append((-ours[length - 1, following].item(), -nats))

    def losses(self) -> tuple[float | None, float | None]:
        """Return the losses of the run and of llama.cpp, in nats per token of whole characters; None without any."""
        if not self._nats:
            return None, None
        run, export = np.mean(self._nats, axis=0)
        return float(run), float(export)


def _whole_tokens(source: Source) -> dict[int, None]:
    """Return the tokens that are whole characters, in order."""
    found: dict[int, None] = {}
    for token in range(source.tokenizer.vocab_size):
        try:
            source.tokenizer.decode_bytes([token]).decode("utf-8")
        except UnicodeDecodeError:
            continue
        if token != source.tokenizer.end_of_text:
            found[token] = None
    return found


def _continue(source: Source, reader: LlamaCpp, start: list[int]) -> tuple[int, int]:
    """Return how many greedy tokens were compared after `start`, and how many are equal before the first other one."""
    count = min(CONTINUED, source.model.config.block_size - len(start))
    ours = [int(token) for token in generate(source.model, torch.tensor([start]), count, temperature=0)]
    if source.tokenizer.end_of_text in ours:  # llama.cpp stops there
        ours = ours[: ours.index(source.tokenizer.end_of_text) + 1]
    theirs = reader.greedy(start, len(ours))
    places = [place for place, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
    return len(ours), places[0] if places else min(len(ours), len(theirs))
