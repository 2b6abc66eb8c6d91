"""Single files: written under a temporary name, flushed, renamed; appended whole or not at all."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from llm.config import expanded
from llm.errors import Failure, UserError
from llm.storage.lacking import FILES_NOT_FLUSHED, FOLDERS_NOT_FLUSHED, UNSUPPORTED, note

JSON_LIMIT = 64 * 2**20  # bytes; nothing we write comes near it, a hostile file might


_CHUNK = 2**20


def _sync_file(file: IO[bytes]) -> None:
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        note(Path(file.name).parent, FILES_NOT_FLUSHED, error)


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk (POSIX: a rename is durable only after this)."""
    if os.name == "nt":  # Windows opens no folders; its renames are journalled
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED | {errno.EBADF, errno.EISDIR}:
            raise
        note(folder, FOLDERS_NOT_FLUSHED, error)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, each with its name flushed to the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)
    folder.mkdir(exist_ok=True)  # raises OSError where a file has its name


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the name `path` only when the block ends without an exception."""
    make_folder(path.parent)
    temporary = _beside(path, "tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            _sync_file(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def append(path: Path, content: bytes) -> None:
    """Add `content` to the end of a file, all of it or nothing: after an OSError the file is as it was.

    It is in the hands of the system when this returns, which a kill of the process does not undo;
    `flush` puts it on the disk.
    """
    before = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab", buffering=0) as file:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    except OSError:
        if path.exists():
            os.truncate(path, before)
        raise


def flush(path: Path) -> None:
    """Put what was appended to a file on the disk, and its name too."""
    with open(path, "ab") as file:
        _sync_file(file)
    sync_folder(path.parent)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    with writing(path) as file:
        file.write(content)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON; NaN and infinities are refused with ValueError, as JSON has none, and what `read_json`
    would not read with OSError."""
    content = (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    if len(content) > JSON_LIMIT:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    write_bytes(path, content)


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises UserError naming the file if it is not readable JSON."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise UserError(f"{path}: larger than {JSON_LIMIT} bytes, so not a file of ours")
        if not path.is_file():  # a pipe or a device would be read for ever
            raise UserError(f"{path}: not a regular file")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a number too long
        raise UserError(f"{path}: not readable as JSON ({error})") from None


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


_LEFT = re.compile(r"\.(.+)\.(tmp|old|probe)-(\d+)")  # the names that `_beside` gives


def _beside(path: Path, what: str) -> Path:
    """A temporary name in the folder of `path`, for this process."""
    return path.with_name(f".{path.name}.{what}-{os.getpid()}")


def check_writable(folder: Path, needed: int = 0) -> None:
    """Raises UserError if `folder` could not be made or written, or has fewer than `needed` bytes free.

    It is not made: the nearest folder above it that is there is tried.
    """
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    try:
        probe = _beside(there / "x", "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot write there ({error.strerror}); choose another folder") from None
    if (free := shutil.disk_usage(there).free) < needed:
        raise UserError(
            f"{folder}: {free / 2**20:.0f} MiB free, {needed / 2**20:.0f} MiB needed; make room or choose another"
        )


def cache_folder() -> Path:
    """Where downloads are kept: LOSSCURVE_CACHE, or `losscurve/` in the user's cache folder. Raises Failure."""
    if own := os.environ.get("LOSSCURVE_CACHE"):
        return Path(expanded(own))
    try:
        return Path(expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "losscurve")
    except UserError:
        raise Failure("the cache folder: no home folder is known here; set LOSSCURVE_CACHE to a folder") from None


def _sync_files(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file():
            with open(path, "rb") as file:
                _sync_file(file)


def rename_folder(folder: Path, new: Path) -> None:
    """Rename a folder, by way of a copy where the file system cannot (see `_free`)."""
    try:
        os.replace(folder, new)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy = _beside(new, "tmp")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy, symlinks=True)
        _sync_files(copy)
        sync_folder(copy)
        os.replace(copy, new)
        sync_folder(new.parent)
        shutil.rmtree(folder)
