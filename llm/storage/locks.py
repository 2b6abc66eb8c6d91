"""A folder's lock, and what processes that are gone left under temporary names."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from llm.errors import UserError
from llm.storage.files import _LEFT, make_folder, rename_folder
from llm.storage.lacking import NO_LOCKS, UNSUPPORTED, note

HELD = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}  # what a lock says that another process holds


class InUse(UserError):
    """Another process holds the lock of `folder`."""

    def __init__(self, folder: Path, message: str) -> None:
        super().__init__(message)
        self.folder = folder


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
