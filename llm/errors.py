"""The two errors that end a command. `main` prints each as one line with cause and remedy, without a traceback."""

from pathlib import Path


class UserError(Exception):
    """The user's input cannot work. The message names the file or field and the remedy. Exit code 2.

    Raised before anything is written.
    """


class Failure(Exception):
    """The work itself failed (a download, a full disk). The message names the cause and the remedy. Exit code 1."""


def no_run(path: Path, lacking: str) -> UserError:
    """Return the error for a `path` that is not the folder of a run; `lacking` is a file that every run has."""
    if not path.is_file():
        return UserError(f"{path}: no run here (no {lacking}); give the folder of a training run")
    such_as = f", such as {path.parent}" if (path.parent / lacking).is_file() else ""
    return UserError(f"{path}: is a file; give the folder of a training run{such_as}")
