"""The lock of a folder, and the removal of temporary files that dead processes left in it."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from llm.errors import UserError
from llm.storage.files import TEMPORARY_NAME, make_folder, rename_folder
from llm.storage.filesystem_limits import NO_LOCKS, UNSUPPORTED, note

HELD = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}  # errors of a lock that another process holds


class InUse(UserError):
    """Another process holds the lock of `folder`."""

    def __init__(self, folder: Path, message: str) -> None:
        super().__init__(message)
        self.folder = folder


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold the lock of `folder` during the block. The system releases it when the process ends, however it ends.

    Temporary files that an interrupted process left are removed, or put back in place (`sweep`). `what` names the use
    of the folder in the message.

    Raises: InUse if another process holds the lock.
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
    """Return whether another process holds the lock of `folder` now."""
    try:
        with locked(folder, ""):
            return False
    except InUse:
        return True


def sweep(folder: Path) -> None:
    """Remove the temporary files that dead processes left in `folder`. The caller holds the folder's lock.

    A folder that was set aside for a replacement that never came gets its name back.
    """
    for path in sorted(folder.iterdir()):
        match = TEMPORARY_NAME.fullmatch(path.name)
        if match is None:
            continue
        final = path.with_name(match[1])
        if match[2] == "old" and not final.exists():
            rename_folder(path, final)
        elif _is_alive(int(match[3])):
            continue
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_alive(pid: int) -> bool:
    if pid == os.getpid() or os.name == "nt":  # on Windows, os.kill would end the process
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
