"""Check every file of a run or of a data folder against what was written: `losscurve verify`."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llm import storage
from llm.config import TrainConfig
from llm.errors import UserError
from llm.record import metrics
from llm.start.run_data import open_run_data, places_of
from llm.storage import checkpoint
from llm.tokens.foreign import characters, check_format
from llm.tokens.remedies import again
from llm.tokens.saved_tokenizer import load_tokenizer
from llm.tokens.token_files import SPLITS, files_of, has_tokens, read_meta
from llm.training import predictions
from llm.weights import read_weights, run_config


@dataclass(frozen=True)
class Finding:
    """The result for one file or folder. `good` is None if there is nothing to check it against."""

    path: Path
    good: bool | None
    message: str


def verify(folder: Path) -> Iterator[Finding]:
    """Yield a finding for each file of a run folder, or of a folder of token files.

    Raises UserError if `folder` is neither.
    """
    if (folder / "config.toml").exists() or checkpoint.saved_steps(folder):
        yield from verify_run(folder)
    elif has_tokens(folder):
        yield from verify_data(folder, {})
    else:
        raise UserError(f"{folder}: neither a run (no config.toml) nor a folder of token files (no train.bin)")


def verify_run(run_dir: Path) -> Iterator[Finding]:
    """Yield a finding for each file of a run, and for the token files that it was trained on, if they are found.

    Checkpoints are checked by their SHA-256 sums, weights by their CRC-32, the tokenizer by its own sum, the record by
    its rows, what teachers predict by its SHA-256 sum.
    """
    config = yield from _try(run_dir / "config.toml", "settings", partial(run_config, run_dir))
    newest_facts = yield from _verify_checkpoints(run_dir)
    for name in ("model.pt", "best.pt"):
        path = run_dir / name
        if path.exists() and config:
            yield from _try(path, "weights", partial(read_weights, path, config.model))
    if config and config.teacher:
        folder = run_dir / predictions.FOLDER
        yield from _try(folder, "what the teachers predict", partial(storage.verify_folder, folder))
    tokenizer = run_dir / "tokenizer.json"
    if tokenizer.exists():
        yield from _try(tokenizer, "tokenizer", partial(load_tokenizer, tokenizer))
    yield from _try(run_dir / metrics.NAME, "record", partial(_check_record, run_dir, newest_facts))
    if config:
        yield from verify_run_data(run_dir, config, newest_facts.get("data", {}))


def _verify_checkpoints(run_dir: Path) -> Generator[Finding, None, dict[str, Any]]:
    """Yield a finding for each checkpoint; return the facts of the newest that is good, {} if there is none."""
    newest_facts: dict[str, Any] = {}
    for step in checkpoint.saved_steps(run_dir):
        path = run_dir / checkpoint.folder_name(step)
        loaded = yield from _try(path, "a checkpoint to resume from", partial(checkpoint.load_state, path))
        if loaded:
            newest_facts = loaded[1]
    for path in sorted(run_dir.glob("damaged-step-*")):
        yield Finding(path, None, "renamed by a resume because it was damaged; not used")
    return newest_facts


def verify_run_data(run_dir: Path, config: TrainConfig, expected: dict[str, str]) -> Iterator[Finding]:
    """Yield a finding for each token file that the run was trained on, if they are found.

    If no place has the right files, those of the first place with any are checked. `expected`: SHA-256 by file name.
    """
    places = places_of(config.data_dir or "data", run_dir, config)
    try:
        folder = open_run_data(run_dir, config, expected).folder
    except (UserError, OSError):
        folder = next((place for place in places if has_tokens(place)), places[0])
    if has_tokens(folder):
        yield from verify_data(folder, expected)
    else:
        yield Finding(folder, None, "no token files here (seen from the current folder)")


def verify_data(folder: Path, expected: dict[str, str]) -> Iterator[Finding]:
    """Yield a finding for each token file: by SHA-256, against `meta.json` and the sums that a run expects.

    `expected`: SHA-256 by file name.
    """
    meta = None
    if (folder / "meta.json").exists():
        meta = yield from _try(folder / "meta.json", "description of the token files", partial(read_meta, folder))
    elif (folder / "meta.pkl").exists():
        yield from _try(folder / "meta.pkl", "characters of the token files", partial(characters, folder))
    try:
        files = [file for split in SPLITS for file in files_of(folder, split, meta)]
    except UserError as error:
        yield _failure(folder, error)
        return
    missing = sorted(expected.keys() - {path.name for path, _ in files})
    if missing:
        yield Finding(folder, False, f"has no {missing[0]}, which the run was trained on; its data are elsewhere")
    for path, facts in files:
        sums = set()
        if path.name in expected:
            sums.add(expected[path.name])
        if facts:
            sums.add(facts["sha256"])
        if sums:
            yield from _try(path, "token ids", partial(_check_sum, path, sums))
        else:
            yield _verify_undescribed(path)
    if meta and (folder / "tokenizer.json").exists():
        yield from _try(folder / "tokenizer.json", "tokenizer", partial(load_tokenizer, folder / "tokenizer.json"))


def _verify_undescribed(path: Path) -> Finding:
    """Return the finding for a token file without a checksum: only its format can be checked."""
    try:
        check_format(path)
    except UserError as error:
        return _failure(path, error)
    return Finding(path, None, "cannot be checked: no meta.json with its checksum")


def _try(path: Path, what: str, check: Callable[[], Any]) -> Generator[Finding, None, Any]:
    """Yield the finding of one check; return what the check returned, None if it failed."""
    try:
        value = check()
    except (UserError, OSError) as error:
        yield _failure(path, error)
        return None
    yield Finding(path, True, what)
    return value


def _failure(path: Path, error: Exception) -> Finding:
    return Finding(path, False, str(error).removeprefix(f"{path}: "))


def _check_record(run_dir: Path, facts: dict[str, Any]) -> None:
    """Raises UserError if the record is damaged or ends before the newest checkpoint."""
    last = max((row["step"] for row in metrics.read_record(run_dir)), default=0)
    progress = facts.get("progress", {"step": 0, "losses": []})
    recorded = progress["step"] - len(progress["losses"])  # losses that are not in the record yet
    if last < recorded:
        raise UserError(f"{run_dir / metrics.NAME}: ends at step {last}, but step {recorded} was recorded")


def _check_sum(path: Path, sums: set[str]) -> None:
    """Raises UserError if the file's SHA-256 differs from any of `sums`."""
    if {storage.sha256(path)} != sums:
        raise UserError(f"{path}: changed since it was written (SHA-256 differs); {again(path.parent)}")
