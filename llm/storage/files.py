"""Single files: written under a temporary name, flushed, renamed; appended completely or not at all."""

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
from llm.storage.filesystem_limits import FILES_NOT_FLUSHED, FOLDERS_NOT_FLUSHED, UNSUPPORTED, note

JSON_LIMIT = 64 * 2**20  # bytes; our own JSON files stay far below it, a hostile one may not

TEMPORARY_NAME = re.compile(r"\.(.+)\.(tmp|old|probe)-(\d+)")  # (name, purpose, process id) of `temporary_path`

_CHUNK_BYTES = 2**20


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that is renamed to `path` only if the block ends without an exception."""
    make_folder(path.parent)
    temporary = temporary_path(path, "tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            sync_file(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    with writing(path) as file:
        file.write(content)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON.

    Raises: ValueError for NaN and infinities, which JSON does not have; OSError for a text that is too large for
        `read_json`.
    """
    content = (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    if len(content) > JSON_LIMIT:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    write_bytes(path, content)


def read_json(path: Path) -> Any:
    """Return the value in a JSON file. Raises: UserError that names the file if it is not readable as JSON."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise UserError(f"{path}: larger than {JSON_LIMIT} bytes, so not a file of ours")
        if not path.is_file():  # reading a pipe or a device might never end
            raise UserError(f"{path}: not a regular file")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number too long
        raise UserError(f"{path}: not readable as JSON ({error})") from None


def read_facts(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file that can be done without, such as env.json; {} if it is lost or damaged."""
    try:
        facts = read_json(path)
    except UserError:
        return {}
    return facts if isinstance(facts, dict) else {}


def append(path: Path, content: bytes) -> None:
    """Append all of `content` to a file, or nothing: after an OSError the file is unchanged.

    When this returns, the operating system has the bytes, so a kill of the process does not lose them; `flush` puts
    them on the disk.
    """
    size_before = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab", buffering=0) as file:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    except OSError:
        if path.exists():
            os.truncate(path, size_before)
        raise


def flush(path: Path) -> None:
    """Flush the content that was appended to a file, and the file's name, to the disk."""
    with open(path, "ab") as file:
        sync_file(file)
    sync_folder(path.parent)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hex, reading it in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync_file(file: IO[bytes]) -> None:
    """Flush the bytes of an open file to the disk; record where the file system cannot do that."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        note(Path(file.name).parent, FILES_NOT_FLUSHED, error)


def sync_files(folder: Path) -> None:
    """Flush the bytes of every file in `folder` to the disk."""
    for path in folder.iterdir():
        if path.is_file():
            with open(path, "rb") as file:
                sync_file(file)


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk; under POSIX a rename is durable only after this."""
    if os.name == "nt":  # Windows cannot open a folder; its renames are journalled
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
    """Make a folder and its missing parents, and flush the name of each to the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)
    folder.mkdir(exist_ok=True)  # raises OSError where a file has this name


def rename_folder(folder: Path, new: Path) -> None:
    """Rename a folder; copy it where the file system cannot rename it, as on an overlay."""
    try:
        os.replace(folder, new)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy = temporary_path(new, "tmp")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy, symlinks=True)
        sync_files(copy)
        sync_folder(copy)
        os.replace(copy, new)
        sync_folder(new.parent)
        shutil.rmtree(folder)


def temporary_path(path: Path, purpose: str) -> Path:
    """Return a hidden name beside `path` that only this process uses; `purpose` is one of TEMPORARY_NAME's."""
    return path.with_name(f".{path.name}.{purpose}-{os.getpid()}")


def check_writable(folder: Path, needed: int = 0) -> None:
    """Check that `folder` could be made and written, and has `needed` bytes free.

    The folder is not made: the check writes into the nearest existing folder above it.

    Raises: UserError that names the folder.
    """
    for path in (folder, *folder.parents):
        if path.is_symlink() and not path.exists():  # a disk that is not mounted, perhaps
            target = path.parent / os.readlink(path)
            raise UserError(f"{path}: leads to {target}, which does not exist; make that folder, or choose another")
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    try:
        probe = temporary_path(existing / "x", "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot write there ({error.strerror}); choose another folder") from None
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{folder}: {free / 2**20:.0f} MiB free, {needed / 2**20:.0f} MiB needed; "
            "free some space, or choose another folder"
        )


def cache_folder() -> Path:
    """Return the folder for downloads: LOSSCURVE_CACHE, else `losscurve/` in the user's cache folder.

    Raises: Failure if the home folder is unknown.
    """
    own = os.environ.get("LOSSCURVE_CACHE")
    return Path(expanded(own)) if own else users_cache_folder()


def users_cache_folder() -> Path:
    """Return `losscurve/` in the user's cache folder, which nobody else writes to.

    Raises: Failure if the home folder is unknown.
    """
    try:
        return Path(expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "losscurve")
    except UserError:
        raise Failure("the cache folder: no home folder is known here; set LOSSCURVE_CACHE to a folder") from None
