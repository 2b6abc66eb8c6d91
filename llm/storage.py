"""Durable files: complete or absent, hashed, verified. Everything the project writes goes through here.

A file is written under a temporary name beside its place, flushed to the disk, and renamed over it;
then the folder is flushed too. After a crash at any moment the old file or the new one is there, whole.
Several files that belong together are changed by a `Transaction`.

Some file systems have no locks, flush no folders or rename none. Work goes on there with less of a promise; `limits`
says what is missing.
"""

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

JSON_LIMIT = 64 * 2**20  # bytes; nothing we write comes near it, a hostile file might
STAGING, READY = ".preparing", ".prepared"  # a transaction before and after its point of no return
KEPT = ".partial"  # the staging of a long one, which is kept when it is interrupted
_CHUNK = 2**20
NO_LOCKS = "this file system has no locks: nothing keeps a second run out of this folder, start one at a time"
FILES_NOT_FLUSHED = "this file system flushes no files: what is saved may be lost in a power cut"
FOLDERS_NOT_FLUSHED = "this file system flushes no folders: the last saves may be undone by a power cut"
REMOVED_SLOWLY = "this file system does not rename it, so it was removed file by file; a kill meanwhile damages it"
UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # a file system that lacks the call
HELD = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}  # what a lock says that another process holds
_noted: set[tuple[str, int]] = set()  # what was noted, and of which file system
_notes: list[str] = []


def note(folder: Path, what: str, error: OSError) -> None:
    """Remember for `limits` what the file system of `folder` does not do, once for each file system."""
    key = what, folder.stat().st_dev
    if key not in _noted:
        _noted.add(key)
        _notes.append(f"{folder}: {what} ({error.strerror or error})")


def limits() -> list[str]:
    """Return what was noted since the last call, in lines for a person."""
    return [_notes.pop(0) for _ in range(len(_notes))]


def _sync_file(file: IO[bytes]) -> None:
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        note(Path(file.name).parent, FILES_NOT_FLUSHED, error)


def _sync_files(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file():
            with open(path, "rb") as file:
                _sync_file(file)


class InUse(UserError):
    """Another process holds the lock of `folder`."""

    def __init__(self, folder: Path, message: str) -> None:
        super().__init__(message)
        self.folder = folder


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


@contextmanager
def folder_in_place(final: Path) -> Iterator[Path]:
    """A new folder that takes the name `final` only when it is complete, with `manifest.json` last.

    The manifest holds the size and SHA-256 of every file, so that `verify_folder` can tell whether
    the folder is still what was written. A folder of that name is set aside until the new one stands.
    """
    make_folder(final.parent)
    temporary, aside = _beside(final, "tmp"), _beside(final, "old")
    if aside.exists() and not final.exists():  # of an attempt that could not even be undone
        os.replace(aside, final)
    for left in (temporary, aside):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        manifest = {}
        for path in sorted(temporary.iterdir()):
            with open(path, "rb") as file:
                _sync_file(file)
            manifest[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
        write_json(temporary / "manifest.json", {"files": manifest})
        if final.exists():
            _free(final, aside)
        os.replace(temporary, final)
    except BaseException:
        if aside.exists() and not final.exists():
            aside.rename(final)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder; after a crash at any moment it is there, whole, or its name is gone (see `sweep`).

    Where the file system cannot rename it, a part may be there, which does not verify.
    """
    temporary = _beside(folder, "tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    _free(folder, temporary)
    sync_folder(folder.parent)
    if temporary.exists():
        shutil.rmtree(temporary)


def _free(folder: Path, aside: Path) -> None:
    """Free the name of a folder: rename it to `aside`, or remove it where the file system cannot rename it.

    An overlay, as containers have, renames no folder of its lower layer. What is half removed there does not verify.
    """
    try:
        os.replace(folder, aside)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        note(folder, REMOVED_SLOWLY, error)
        shutil.rmtree(folder)


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


def verify_folder(folder: Path) -> None:
    """Raises UserError naming the first file that is missing, added or changed since it was written."""
    if (folder / "manifest.json").is_symlink():
        raise UserError(f"{folder / 'manifest.json'}: not a regular file")
    manifest = read_json(folder / "manifest.json")
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not files:
        raise UserError(f"{folder / 'manifest.json'}: lists no files")
    present = {path.name for path in folder.iterdir()} - {"manifest.json"}
    for name in sorted(present | set(files)):
        path, entry = folder / name, files.get(name)
        if name != Path(name).name or name not in present or not isinstance(entry, dict):
            raise UserError(f"{path}: {'not in the manifest' if name in present else 'missing'}")
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{path}: not a regular file")
        if path.stat().st_size != entry.get("size") or sha256(path) != entry.get("sha256"):
            raise UserError(f"{path}: changed since it was written (SHA-256 differs)")


@contextmanager
def transaction(folder: Path, keep: bool = False) -> Iterator[Path]:
    """Replace several files of `folder` together: write the new ones into the path this yields.

    Until the block ends, `folder` is untouched. Then the staging folder is renamed, the point of no
    return, and its files are moved into place. `recover` finishes or undoes what a crash left.
    With `keep`, what an interrupted block has written stays, and the next one finds it in its path.
    """
    make_folder(folder)
    recover(folder)
    staging = folder / (KEPT if keep else STAGING)
    if keep:
        make_folder(staging)
        sweep(staging)
    else:
        staging.mkdir()
    try:
        yield staging
        _sync_files(staging)
        sync_folder(staging)
        rename_folder(staging, folder / READY)
    except BaseException:
        if not keep:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_folder(folder)
    recover(folder)


def recover(folder: Path) -> None:
    """Roll an interrupted `transaction` of `folder` forward if it was complete, else undo it.

    The caller holds the folder's lock where another process might be preparing it: see `unfinished`.
    """
    if (folder / STAGING).exists():
        shutil.rmtree(folder / STAGING)
    ready = folder / READY
    if ready.exists():
        for path in sorted(ready.iterdir()):
            os.replace(path, folder / path.name)
        sync_folder(folder)
        ready.rmdir()
        sync_folder(folder)


def unfinished(folder: Path) -> bool:
    """Whether a `transaction` of `folder` is under way or was interrupted: lock it, then `recover`."""
    return (folder / STAGING).exists() or (folder / READY).exists()


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold `folder`'s lock; the system releases it when the process ends, however it ends.

    What an interrupted process left under temporary names is removed, or put back where it belongs.
    Raises UserError if another process holds the lock. `what` names the folder's use in that message.
    """
    make_folder(folder)
    with open(folder / ".lock", "a+b") as file:
        try:
            _lock(file)
        except OSError as error:
            if error.errno in HELD:
                raise InUse(
                    folder, f"{folder}: {what} is in use by another process; wait for it, or choose another folder"
                ) from None
            if error.errno not in UNSUPPORTED | {errno.ENOLCK}:
                error.filename = file.name
                raise
            note(folder, NO_LOCKS, error)
        sweep(folder)
        yield


def in_use(folder: Path) -> bool:
    """Whether another process holds the lock of `folder` now."""
    try:
        with locked(folder, ""):
            return False
    except InUse:
        return True


_LEFT = re.compile(r"\.(.+)\.(tmp|old|probe)-(\d+)")  # the names that `_beside` gives


def _beside(path: Path, what: str) -> Path:
    """A temporary name in the folder of `path`, for this process."""
    return path.with_name(f".{path.name}.{what}-{os.getpid()}")


def sweep(folder: Path) -> None:
    """Remove what processes that are gone left in `folder` under temporary names.

    A folder that was set aside for one that never came is put back. The caller holds the folder's lock.
    """
    for path in sorted(folder.iterdir()):
        left = _LEFT.fullmatch(path.name)
        if left is None:
            continue
        if left[2] == "old" and not path.with_name(left[1]).exists():
            rename_folder(path, path.with_name(left[1]))
        elif _alive(int(left[3])):
            continue
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _alive(pid: int) -> bool:
    if pid == os.getpid() or os.name == "nt":  # there, asking would end the process
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _lock(file: IO[bytes]) -> None:
    if os.name == "nt":
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


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
