"""The two errors that end a command. `main` prints each as one line with cause and remedy, without a traceback."""


class UserError(Exception):
    """The user's input cannot work. The message names the file or field and the remedy. Exit code 2.

    Raised before anything is written.
    """


class Failure(Exception):
    """The work itself failed (a download, a full disk). The message names the cause and the remedy. Exit code 1."""
