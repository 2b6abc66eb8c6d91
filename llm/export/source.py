"""What an export is made from: a run's model, its tokenizer and the start of its validation text."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm.arch import Model
from llm.checks.memorised import run_tokens
from llm.errors import UserError
from llm.run import Run
from llm.start.run_folder import Say
from llm.tokens.tokenizer import Ids, Tokenizer

VALIDATION_TOKENS = 16_384  # at the start of the validation split, at most


@dataclass(frozen=True)
class Source:
    """A run to export. `model` is in float32, on the CPU, in evaluation mode."""

    run: Run
    weights: str  # name of the file
    model: Model
    tokenizer: Tokenizer
    validation: Ids  # (N,); empty if the run's token files are not here
    data_dir: str | None = None  # where they are, if not where the run left them


def open_source(run_dir: Path, to: str, weights: str = "best", data_dir: str | None = None, say: Say = print) -> Source:
    """Return the run in `run_dir` with its "best" weights (its last if it has no others), or with its "last".

    `to` is the format that it is for: hf, gguf or html. `say` gets a line if the run's token files are not where the
    run left them: the proof then lacks the validation text. Raises UserError if there is no run, it has no weights, its
    tokenizer does not go into the format, or `data_dir` does not hold its token files.
    """
    run = Run.open(run_dir)
    if to != "hf":
        _check_tokenizer(run_dir, run.tokenizer, to)  # before the weights are read
    if weights == "best" and not (run.path / "best.pt").is_file():
        weights = "last"
    name = {"best": "best.pt", "last": "model.pt"}[weights]
    model, tokenizer = run.model(weights, "cpu"), run.tokenizer
    return Source(run, name, model, tokenizer, _validation(run, data_dir, say), data_dir)


def _check_tokenizer(run_dir: Path, tokenizer: Tokenizer, to: str) -> None:
    """Raise UserError for another program's tokenizer, which only a folder in Hugging Face's format holds."""
    if tokenizer.kind != "hf":
        return
    export = f"losscurve export {shlex.quote(str(run_dir))} --to hf"
    if to == "html":
        raise UserError(f"{run_dir}: the page has no tokenizer of another program; export it with: {export}")
    folder = shlex.quote(f"{run_dir}-hf")
    raise UserError(
        f"{run_dir}: its tokenizer is another program's, and llama.cpp knows those by name; export it with: {export}, "
        f"and convert that with llama.cpp's: python convert_hf_to_gguf.py {folder}"
    )


def _validation(run: Run, data_dir: str | None, say: Say) -> Ids:
    try:
        tokens = run_tokens(run, data_dir, say).val
    except UserError as error:
        if data_dir is not None:
            raise
        say(f"{error}; without them, the export is compared with the run on the hostile text only")
        return np.zeros(0, dtype=np.int64)
    return np.asarray(tokens[: min(VALIDATION_TOKENS, len(tokens))])
