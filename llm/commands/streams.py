"""Standard input, output and error as a command may find them: closed, full, or in an encoding of few characters."""

import errno
import io
import os
import re
import sys

from llm.errors import UserError


def settle() -> None:
    """Make the three streams usable, whatever this process was started with. Does not return where it has to start
    Python anew, see `_start_in_utf8`.
    """
    global _output
    _start_in_utf8()
    # a number that stays free would go to the next file opened, into which a `print` would then write
    if sys.stdin is None:
        os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)
        sys.stdin = io.TextIOWrapper(io.BufferedReader(_Closed()))
    if sys.stdout is None:
        os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)  # writing fails, as on any file that takes nothing
    if sys.stderr is None:
        os.set_inheritable(os.open(os.devnull, os.O_WRONLY), True)
    # a stream that is not Python's own was put there by a test or a notebook
    if sys.stdout is sys.__stdout__:
        _output = _Output(1, "w", closefd=False)
        encoding, unbuffered = (sys.stdout.encoding, sys.stdout.write_through) if sys.stdout else ("utf-8", False)
        buffer = io.BufferedWriter(_output)
        sys.stdout = io.TextIOWrapper(
            buffer, encoding, line_buffering=_output.isatty() or unbuffered, write_through=unbuffered
        )
    if sys.stderr is sys.__stderr__:
        encoding = sys.stderr.encoding if sys.stderr else "utf-8"
        unheard = io.BufferedWriter(_Unheard(2, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(unheard, encoding, "backslashreplace", line_buffering=True, write_through=True)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # "?" where the terminal has no such character


def failed() -> OSError | None:
    """Why a part of stdout was not written, if it was not; what it still held is dropped then."""
    try:
        sys.stdout.flush()
    except OSError as error:
        drop()
        return error
    lost = last_error()  # argparse, for one, takes no notice of it
    if lost:
        drop()
    return lost


def last_error() -> OSError | None:
    """What the last write to stdout that failed raised."""
    return _output.error if _output else None


def drop() -> None:
    """Let stdout lead nowhere, and forget what failed: the flush at the end of the process must not."""
    if _output:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, _output.fileno())
        os.close(null)
        _output.error = None


def reason(error: OSError) -> str:
    """Why stdout cannot be written, in words."""
    return "it is closed" if error.errno == errno.EBADF else error.strerror or str(error)


def readable(text: str) -> str:
    r"""`text` with the bytes of a file name that are not UTF-8 as \xe9, not as Python's surrogates."""
    return re.sub("[\udc80-\udcff]", lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", text)


class _Closed(io.RawIOBase):
    """A standard input that was closed from the start."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        raise UserError("standard input is closed; give a file instead of -")


class _Output(io.FileIO):
    """Stdout, which remembers that a write failed."""

    error: OSError | None = None

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            self.error = error
            raise


class _Unheard(io.FileIO):
    """Stderr, whose failed writes are dropped: that nobody hears a warning must not end what it warns of."""

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError:
            return len(memoryview(data))  # type: ignore[arg-type]


_output: _Output | None = None


def _start_in_utf8() -> None:
    """Start Python anew in UTF-8, in the place of this process, where the locale knows ASCII only and an argument is
    UTF-8: it would come as lone surrogates, and files of such names could not be opened by their name as it reads.
    """
    if sys.flags.utf8_mode or sys.getfilesystemencoding().lower() not in ("ascii", "us-ascii"):
        return
    try:
        needed = any(not os.fsencode(word).decode("utf-8").isascii() for word in sys.argv)
    except UnicodeDecodeError:  # not UTF-8 either: kept as bytes, and named so
        return
    if needed:
        os.execve(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})
