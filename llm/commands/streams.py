"""Make stdin, stdout and stderr usable even if they are closed, full, or in an encoding that lacks characters."""

import errno
import io
import os
import re
import sys

from llm.errors import UserError

_stdout: "_Stdout | None" = None  # the file below sys.stdout, once `make_usable` has replaced it


def make_usable() -> None:
    """Make stdin, stdout and stderr usable, in whatever state this process received them.

    If `_restart_in_utf8` replaces this process by Python in UTF-8 mode, this does not return.
    """
    _restart_in_utf8()
    _open_closed_streams()
    # a stream that is not Python's own was put there by a test or a notebook, and stays
    if sys.stdout is sys.__stdout__:
        _replace_stdout()
    if sys.stderr is sys.__stderr__:
        _replace_stderr()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # "?" for a character that the terminal does not have


def _open_closed_streams() -> None:
    """Open the file descriptors of closed streams.

    The next file opened would get a descriptor that stays free, and `print` would write into that file.
    """
    if sys.stdin is None:
        os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)
        sys.stdin = io.TextIOWrapper(io.BufferedReader(_ClosedStdin()))
    if sys.stdout is None:
        os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)  # read-only, so that a write fails
    if sys.stderr is None:
        os.set_inheritable(os.open(os.devnull, os.O_WRONLY), True)


def _replace_stdout() -> None:
    global _stdout
    _stdout = _Stdout(1, "w", closefd=False)
    encoding = sys.stdout.encoding if sys.stdout else "utf-8"
    is_unbuffered = getattr(sys.stdout, "write_through", False)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_stdout),
        encoding,
        line_buffering=_stdout.isatty() or is_unbuffered,
        write_through=is_unbuffered,
    )


def _replace_stderr() -> None:
    encoding = sys.stderr.encoding if sys.stderr else "utf-8"
    buffer = io.BufferedWriter(_Stderr(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True, write_through=True)


def flush_stdout() -> OSError | None:
    """Flush stdout. If a write to it has failed, discard its buffer and return the error."""
    try:
        sys.stdout.flush()
    except OSError as error:
        discard_stdout()
        return error
    ignored = last_error()  # argparse, for one, ignores a failed write
    if ignored:
        discard_stdout()
    return ignored


def last_error() -> OSError | None:
    """Return the error of the last write to stdout that failed."""
    return _stdout.error if _stdout else None


def discard_stdout() -> None:
    """Redirect stdout to the null device and forget its error, so that the flush at the process's end cannot fail."""
    if _stdout:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, _stdout.fileno())
        os.close(null)
        _stdout.error = None


def describe(error: OSError) -> str:
    """Return a phrase that says why stdout cannot be written."""
    if error.errno == errno.EBADF:
        return "it is closed"
    return error.strerror or str(error)


def escape_bytes(text: str) -> str:
    r"""Return `text` with the bytes that are not UTF-8 as \xe9, in place of Python's lone surrogates."""
    return re.sub("[\udc80-\udcff]", lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", text)


class _ClosedStdin(io.RawIOBase):
    """A standard input that was closed when the process started. Reading raises UserError."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        raise UserError("standard input is closed; give a file instead of -")


class _Stdout(io.FileIO):
    """A standard output that remembers the error of a failed write."""

    error: OSError | None = None

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            self.error = error
            raise


class _Stderr(io.FileIO):
    """A standard error that drops failed writes: a warning that nobody reads must not end the work."""

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError:
            return len(memoryview(data))  # type: ignore[arg-type]


def _restart_in_utf8() -> None:
    """Restart Python in UTF-8 mode, in place of this process, if the locale is ASCII and an argument is UTF-8.

    Python would decode that argument to lone surrogates, and could not open a file by the name that it prints.
    """
    if sys.flags.utf8_mode or sys.getfilesystemencoding().lower() not in ("ascii", "us-ascii"):
        return
    try:
        is_needed = any(not os.fsencode(word).decode("utf-8").isascii() for word in sys.argv)
    except UnicodeDecodeError:  # not UTF-8 either: the argument stays as bytes, and messages escape them
        return
    if is_needed:
        os.execve(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})
