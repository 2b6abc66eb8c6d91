"""Calls that a file system does not support: recorded where storage meets them, reported once to the user."""

import errno
from pathlib import Path

NO_LOCKS = (
    "this file system does not support file locks: nothing keeps a second run out of this folder; start one at a time"
)

FILES_NOT_FLUSHED = "this file system does not support fsync on files: a power cut may lose what was saved"

FOLDERS_NOT_FLUSHED = "this file system does not support fsync on folders: a power cut may undo the last saves"

REMOVED_SLOWLY = (
    "this file system cannot rename the folder, so it was removed file by file; a kill during that leaves it damaged"
)

UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # a file system that lacks the call

_recorded: set[tuple[str, int]] = set()  # (limit, device number of the file system)

_unreported: list[str] = []


def note(folder: Path, limit: str, error: OSError) -> None:
    """Record a `limit` of the file system of `folder` for `limits`, once per file system."""
    key = limit, folder.stat().st_dev
    if key not in _recorded:
        _recorded.add(key)
        _unreported.append(f"{folder}: {limit} ({error.strerror or error})")


def limits() -> list[str]:
    """Return the limits recorded since the last call, one line of text each."""
    lines = []
    while _unreported:  # removed one by one, since the saving thread may add another meanwhile
        lines.append(_unreported.pop(0))
    return lines
