"""Find the token files of a run, even if the run folder was moved or the current folder is another."""

import os
from pathlib import Path

from llm import storage
from llm.config import TrainConfig
from llm.data import TokenData, open_data
from llm.errors import UserError
from llm.start.run_folder import Say
from llm.tokens.token_files import has_tokens


def open_run_data(
    run_dir: Path,
    config: TrainConfig,
    expected: dict[str, str] | None,
    given: str | None = None,
    say: Say = lambda line: None,
) -> TokenData:
    """Return the token files of the run in `run_dir`.

    They are in `given`, else in the folder that `config` names: relative to the current folder, else relative to the
    run folder. Only files with the `expected` SHA-256 (by file name) are accepted; without hashes only the first place
    is tried.

    Raises UserError that names the places if none of them has the files.
    """
    places = [Path(given)] if given else places_of(config.data_dir or "data", run_dir, config)
    found = [place for place in places[: None if expected else 1] if has_tokens(place) or storage.unfinished(place)]
    if not found:
        also = f", nor in {places[1]}" if expected and len(places) > 1 else ""
        raise UserError(
            f"{places[0]}: the run's token files are not there (seen from here){also}; say where by --data_dir"
        )
    errors = []
    for place in found:
        try:
            data = open_data(place, config.model.block_size, config.model.vocab_size)
        except UserError as error:
            errors.append(error)
            continue
        if expected in (None, data.hashes):
            if place != places[0]:
                say(f"{places[0]}: not the run's token files (seen from here); they are in {place}, beside the run")
            return data
        errors.append(UserError(f"{place}: not the data this run was trained on; give the right --data_dir"))
    raise errors[0]


def hashes_of(run_dir: Path) -> dict[str, str] | None:
    """Return the SHA-256 of the run's token files by name, as its env.json has them; None if that is lost."""
    hashes = storage.read_facts(run_dir / "env.json").get("data")
    return hashes if isinstance(hashes, dict) else None


def places_of(name: str, run_dir: Path, config: TrainConfig) -> list[Path]:
    """Return the places where a path in the settings of the run in `run_dir` may be.

    These are relative to the current folder, and at the same place relative to the run folder as when the run began.
    """
    named, out_dir = Path(name), Path(config.out_dir)
    places = [named]
    if named.anchor == out_dir.anchor:  # both relative or both absolute: so the path between them is known
        way = os.path.relpath(named, out_dir)
        for folder in (os.path.abspath(run_dir), run_dir.resolve()):  # as named, and with links resolved
            place = Path(os.path.normpath(os.path.join(folder, way)))
            if place not in {Path(os.path.abspath(known)) for known in places}:
                places.append(place if run_dir.is_absolute() else Path(os.path.relpath(place)))
    return places


def beside(folder: Path, out_dir: Path) -> str:
    """Return `folder` as settings hold it: absolute if `out_dir` is, so that the run resumes from any folder."""
    return os.path.abspath(folder) if out_dir.is_absolute() else str(folder)
