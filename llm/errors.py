"""The two ways a command ends badly. Both print one line of cause and one of remedy, never a trace."""


class UserError(Exception):
    """A person's input cannot work: names the file or field and the remedy. Exit code 2.

    Raised before anything is written.
    """


class Failure(Exception):
    """The work itself failed (a download, a full disk): names the cause and the remedy. Exit code 1."""
