"""What a file system lacks: noted where it shows, and said once."""

import errno
from pathlib import Path

NO_LOCKS = "this file system has no locks: nothing keeps a second run out of this folder, start one at a time"


FILES_NOT_FLUSHED = "this file system flushes no files: what is saved may be lost in a power cut"


FOLDERS_NOT_FLUSHED = "this file system flushes no folders: the last saves may be undone by a power cut"


REMOVED_SLOWLY = "this file system does not rename it, so it was removed file by file; a kill meanwhile damages it"


UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # a file system that lacks the call


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
