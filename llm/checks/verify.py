"""Whether every file of a run or of a data folder is still what was written: `losscurve verify`."""

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
from llm.weights import read_weights, run_config


@dataclass(frozen=True)
class Finding:
    """What became of one file or folder: `good` is None where there was nothing to check it against."""

    path: Path
    good: bool | None
    words: str


def verify(folder: Path) -> Iterator[Finding]:
    """Everything in a run folder, or in a folder of token files. Raises UserError where it is neither."""
    if (folder / "config.toml").exists() or checkpoint.saved_steps(folder):
        yield from verify_run(folder)
    elif has_tokens(folder):
        yield from verify_data(folder, {})
    else:
        raise UserError(f"{folder}: neither a run (no config.toml) nor a folder of token files (no train.bin)")


def verify_run(run_dir: Path) -> Iterator[Finding]:
    """States by their SHA-256 sums, weights by their CRC-32, tokenizer by its own sum, the record by its rows,
    and the token files the run was trained on, if they can be found.
    """
    config = yield from _try(run_dir / "config.toml", "settings", partial(run_config, run_dir))
    newest: dict[str, Any] = {}
    for step in checkpoint.saved_steps(run_dir):
        path = run_dir / checkpoint.folder_name(step)
        loaded = yield from _try(path, "a state to resume from", partial(checkpoint.load_state, path))
        newest = loaded[1] if loaded else newest
    for path in sorted(run_dir.glob("damaged-step-*")):
        yield Finding(path, None, "set aside by a resume, and not used")
    for name in ("latest", "best"):
        if (run_dir / name).exists():
            yield from _try(run_dir / name, "names a saved state", partial(_pointed_at, run_dir / name))
    for name in ("model.pt", "best.pt"):
        if (run_dir / name).exists() and config:
            yield from _try(run_dir / name, "weights", partial(read_weights, run_dir / name, config.model))
    if (run_dir / "tokenizer.json").exists():
        yield from _try(run_dir / "tokenizer.json", "tokenizer", partial(load_tokenizer, run_dir / "tokenizer.json"))
    yield from _try(run_dir / metrics.NAME, "record", partial(_reaches, run_dir, newest))
    if config:
        yield from verify_run_data(run_dir, config, newest.get("data", {}))


def verify_run_data(run_dir: Path, config: TrainConfig, expected: dict[str, str]) -> Iterator[Finding]:
    """The token files of a run, if they can be found; those of the first place where some are, if none is right."""
    places = places_of(config.data_dir or "data", run_dir, config)
    try:
        folder = open_run_data(run_dir, config, expected).folder
    except (UserError, OSError):
        folder = next((place for place in places if has_tokens(place)), places[0])
    if has_tokens(folder):
        yield from verify_data(folder, expected)
    else:
        yield Finding(folder, None, "the token files are not there (seen from here)")


def verify_data(folder: Path, expected: dict[str, str]) -> Iterator[Finding]:
    """Token files by their SHA-256, against `meta.json` and the hashes a run `expected` them to have, by name."""
    meta = None
    if (folder / "meta.json").exists():
        meta = yield from _try(folder / "meta.json", "description of the token files", partial(read_meta, folder))
    elif (folder / "meta.pkl").exists():
        yield from _try(folder / "meta.pkl", "characters of the token files", partial(characters, folder))
    try:
        files = [file for split in SPLITS for file in files_of(folder, split, meta)]
    except UserError as error:
        yield Finding(folder, False, str(error).removeprefix(f"{folder}: "))
        return
    if lost := sorted(expected.keys() - {path.name for path, _ in files}):
        yield Finding(folder, False, f"has no {lost[0]}, which the run was trained on; its data are elsewhere")
    for path, facts in files:
        known = [expected.get(path.name), facts["sha256"] if facts else None]
        sums = {value for value in known if value is not None}
        if not sums:
            yield _undescribed(path)
            continue
        yield from _try(path, "token ids", partial(_has_sum, path, sums))
    if meta and (folder / "tokenizer.json").exists():
        yield from _try(folder / "tokenizer.json", "tokenizer", partial(load_tokenizer, folder / "tokenizer.json"))


def _undescribed(path: Path) -> Finding:
    try:
        check_format(path)
    except UserError as error:
        return Finding(path, False, str(error).removeprefix(f"{path}: "))
    return Finding(path, None, "no meta.json says what it should be")


def _try(path: Path, what: str, check: Callable[[], Any]) -> Generator[Finding, None, Any]:
    """The finding about one check; the generator's value is what the check returned, None if it failed."""
    try:
        value = check()
    except (UserError, OSError) as error:
        yield Finding(path, False, str(error).removeprefix(f"{path}: "))
        return None
    yield Finding(path, True, what)
    return value


def _pointed_at(path: Path) -> None:
    name = path.read_text(encoding="utf-8", errors="replace").strip()
    if name not in {checkpoint.folder_name(step) for step in checkpoint.saved_steps(path.parent)}:
        raise UserError(f"{path}: names {name[:80]!r}, and no such state is there")


def _reaches(run_dir: Path, facts: dict[str, Any]) -> None:
    """Raises UserError where the record is damaged or ends before the newest state."""
    last = max((row["step"] for row in metrics.read_record(run_dir)), default=0)
    progress = facts.get("progress", {"step": 0, "losses": []})
    if last < (recorded := progress["step"] - len(progress["losses"])):
        raise UserError(f"{run_dir / metrics.NAME}: ends at step {last}, and step {recorded} was recorded")


def _has_sum(path: Path, sums: set[str]) -> None:
    if {storage.sha256(path)} != sums:
        raise UserError(f"{path}: changed since it was written (SHA-256 differs); {again(path.parent)}")
