"""Evaluate weights of any format on any text, or on the validation split of their run, so that they compare."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from llm.checks.memorised import run_tokens
from llm.errors import UserError
from llm.evaluate import Evaluation, evaluate
from llm.machine.device import choose_dtype, precision
from llm.run import Run
from llm.start.run_folder import Say
from llm.text.corpus import Corpus
from llm.tokens.bpe import gpt2
from llm.tokens.cut import pieces
from llm.tokens.token_files import Tokens
from llm.tokens.tokenizer import Ids, Tokenizer
from llm.weights import Opened

Progress = Callable[[int, int], None]  # (done, of all)
FOREIGN_WINDOW = 1024  # tokens, at most: attention over a context of 32,768 would not fit in memory


@dataclass(frozen=True)
class Task:
    """What is evaluated, and how."""

    text: Corpus | None  # opened, so that a pipe is read once for all models; None is the run's validation split
    window: int | None  # tokens; None is the run's block_size, or at most FOREIGN_WINDOW of another model's
    stride: int | None  # tokens between the starts of two windows; None: they do not overlap
    data_dir: str | None  # the run's token files, if they have moved
    dtype: str | None  # None: float32 for a text; the run's own for its validation split


@dataclass(frozen=True)
class Score:
    """How well one model predicts a text."""

    weights: str  # the file or folder that was evaluated
    text: str  # its name
    found: Evaluation
    window: int  # tokens
    stride: int | None  # None: the windows do not overlap
    dtype: str  # of matrix products

    @property
    def perplexity(self) -> float:
        """Return e to the power of the loss."""
        return math.exp(self.found.loss) if self.found.loss < 700 else math.inf


def score(opened: Opened, task: Task, device: torch.device, say: Say, progress: Progress | None = None) -> Score:
    """Evaluate a model on the text of `task`, or on the validation split of its run as the run does.

    `say` gets a line about each thing that the figures depend on and a person may not expect. `progress` is as in
    `evaluate`. Raises UserError.
    """
    window = _window(opened, task.window)
    if task.stride is not None and task.stride > window:
        raise UserError(
            f"stride = {task.stride}: windows of {window} tokens would leave some out; give {window} or less"
        )
    tokenizer = opened.tokenizer or gpt2()
    tokens: Tokens
    if task.text is not None:
        tokens, name = text_tokens(task.text, tokenizer), task.text.name
        limit, dtype = len(tokens), choose_dtype(task.dtype or "float32", device)
    else:
        run = _run_of(opened)
        data = run_tokens(run, task.data_dir, say)
        tokens, name = data.val, f"validation split of {data.source or data.folder}"
        limit, dtype = run.config.eval_tokens, choose_dtype(task.dtype or run.config.dtype, device)
    if len(tokens) < 2:
        raise UserError(f"{name}: {len(tokens)} tokens, and one is predicted from another; give more text")
    if not tokenizer.is_lossless:
        say(f"{opened.path}: its tokenizer changes a text before it cuts it, so the bytes are those of its tokens")
    with precision(dtype, device):
        lengths = tokenizer.token_bytes()
        found = evaluate(opened.model(device), tokens, window, limit, lengths, stride=task.stride, progress=progress)
    return Score(str(opened.path), name, found, window, task.stride, str(dtype).removeprefix("torch."))


def _window(opened: Opened, given: int | None) -> int:
    longest = opened.config.block_size
    if given is not None and given > longest:
        raise UserError(f"window = {given}: {opened.path} has a context of {longest} tokens; give that or less")
    return given or (longest if opened.is_ours else min(longest, FOREIGN_WINDOW))


def _run_of(opened: Opened) -> Run:
    if not opened.is_ours:
        raise UserError(f"{opened.path}: is no run, so it has no validation split; give a text: --text FILE")
    return Run.open(opened.path.parent)


def text_tokens(text: Corpus, tokenizer: Tokenizer) -> Ids:
    """Return the ids (N,) of a text. Between two documents is an end-of-text, if the tokenizer has one.

    Empty documents are skipped, as they are when a text is prepared. Raises UserError if the text cannot be read, or
    the tokenizer cannot encode it.
    """
    parts: list[Ids] = []
    for file in text.files:
        for document in ([row] for row in file.read()) if file.in_rows else [file.read()]:
            ids = [_encode(tokenizer, piece, file.label) for piece in pieces(document)]
            if parts and ids and tokenizer.end_of_text is not None:
                parts.append(np.array([tokenizer.end_of_text]))
            parts += ids
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _encode(tokenizer: Tokenizer, piece: str, label: str) -> Ids:
    """Return the ids of a piece of the text `label`. Raises UserError if a character is not in the vocabulary."""
    try:
        return tokenizer.encode(piece)
    except UserError as error:
        cause = str(error).partition(";")[0]
        raise UserError(f"{label}: {cause}; remove it, or evaluate weights with another tokenizer") from None
