"""A disk that can fail: every change of a file below one folder goes through here, is recorded, and may fail.

While a `Disk` is in place, `open`, the calls of `os` that change files, and `shutil.rmtree` are its own for paths
below its root; all others pass through. Writes are buffered as Python buffers them, so that bytes which were never
flushed never reach the disk. Nothing is really flushed to the device: that a test's own machine stays up is assumed.
"""

import builtins
import errno
import io
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUFFER = 8192  # bytes a file holds back, as Python's own
TAKES_ROOM = ("create", "mkdir", "link", "symlink", "rename", "write")  # what a full disk refuses


class Killed(BaseException):
    """The process was killed here. No handler changes a file any more: every later operation raises it too."""


@dataclass(frozen=True)
class Fault:
    """Which operation fails and how.

    `killed`: the `at`-th and every later one. `ENOSPC`, `EIO`: the `at`-th, or every one from there on.
    `short`: the `at`-th write takes half of the bytes, and there is no room for the rest; if `forever`, from
    then on there is room for nothing new, while removing still works. `rename`: the `at`-th rename is refused, and
    if `forever` every later one, while all else works.
    """

    kind: str
    at: int
    forever: bool = False


@dataclass(frozen=True)
class Op:
    """One operation that succeeded. Files and folders are numbered, as a name may move from one to another."""

    kind: str  # create mkdir symlink link unlink rmdir rename write truncate fsync mark
    path: str
    number: int = -1
    place: tuple[int, str] | None = None  # (number of the folder, name) that is made or taken away
    target: tuple[int, str] | None = None  # where a rename leads
    data: bytes = b""
    offset: int = 0


@dataclass
class Node:
    """A file, folder or symbolic link as it stands on the disk."""

    kind: str
    data: bytes = b""
    entries: dict[str, int] = field(default_factory=dict)


class Disk:
    """Use as a context manager. `log` is what happened, `count` how many operations were tried, `first` what was
    there before. With `overlay` a folder that was there before cannot be renamed, as in the lower layer of a
    container's disk."""

    def __init__(self, root: Path, fault: Fault | None = None, overlay: bool = False) -> None:
        self.root, self.fault, self.overlay = os.path.abspath(root), fault, overlay
        self.log: list[Op] = []
        self.count = self.writes = self.renames = 0
        self.struck = self.dead = self.full = False
        self.first: dict[int, Node] = {}
        self._numbers: dict[tuple[int, int], int] = {}  # by device and inode
        self._next = 0
        self._lock = threading.RLock()
        self._real: dict[str, Any] = {}
        self._patched: list[tuple[Any, str, Any]] = []

    def mark(self, text: str) -> None:
        """Note in the log what was promised at this moment. Nothing is promised by a process that is dead."""
        if self.dead:
            raise Killed(text)
        self.log.append(Op("mark", text))

    @property
    def marks(self) -> list[str]:
        return [op.path for op in self.log if op.kind == "mark"]

    def __enter__(self) -> "Disk":
        self._take_stock(self.root)
        ours: dict[str, Callable[..., Any]] = {
            "open": self._os_open,
            "write": self._os_write,
            "close": self._os_close,
            "fsync": self._fsync,
            "replace": self._rename,
            "rename": self._rename,
            "unlink": self._unlink,
            "remove": self._unlink,
            "mkdir": self._mkdir,
            "rmdir": self._rmdir,
            "truncate": self._truncate,
            "ftruncate": self._truncate,
            "symlink": self._symlink,
            "link": self._link,
        }
        if hasattr(os, "fdatasync"):
            ours["fdatasync"] = self._fsync
        self._real = {name: getattr(os, name) for name in ours}
        self._real["file"], self._real["rmtree"] = builtins.open, shutil.rmtree
        for name, call in ours.items():
            self._patch(os, name, call)
        self._patch(builtins, "open", self._open)
        self._patch(io, "open", self._open)
        self._patch(shutil, "rmtree", self._rmtree)
        return self

    def __exit__(self, *_: object) -> None:
        while self._patched:
            owner, name, call = self._patched.pop()
            setattr(owner, name, call)

    def _patch(self, owner: Any, name: str, call: Any) -> None:
        self._patched.append((owner, name, getattr(owner, name)))
        setattr(owner, name, call)

    def _take_stock(self, path: str) -> int:
        """Number what is at `path` and below."""
        state = os.lstat(path)
        number = self._number(state)
        if os.path.islink(path):
            self.first[number] = Node("symlink", os.fsencode(os.readlink(path)))
        elif os.path.isdir(path):
            self.first[number] = Node("folder")
            names = sorted(os.listdir(path))
            self.first[number].entries = {name: self._take_stock(os.path.join(path, name)) for name in names}
        else:
            self.first[number] = Node("file", Path(path).read_bytes())
        return number

    def _number(self, state: os.stat_result, new: bool = False) -> int:
        key = (state.st_dev, state.st_ino)
        if new or key not in self._numbers:
            self._numbers[key] = self._next
            self._next += 1
        return self._numbers[key]

    def _forget(self, state: os.stat_result | None) -> None:
        """The system may give the inode of a file that is gone to another."""
        if state is not None and (state.st_nlink <= 1 or stat.S_ISDIR(state.st_mode)):
            self._numbers.pop((state.st_dev, state.st_ino), None)

    def _known(self, handle: int) -> int | None:
        """The number of the file that is open as `handle`, None if it is not of this disk."""
        state = os.fstat(handle)
        return self._numbers.get((state.st_dev, state.st_ino))

    def _inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The whole path, if it is below the root."""
        if isinstance(path, int):
            return None
        whole = os.path.abspath(os.fsdecode(path))
        if whole != self.root and not whole.startswith(self.root + os.sep):
            return None
        assert dir_fd is None, "paths relative to a handle are not followed"
        return whole

    def _place(self, path: str) -> tuple[int, str]:
        state = os.stat(os.path.dirname(path))
        return self._numbers[state.st_dev, state.st_ino], os.path.basename(path)

    @contextmanager
    def _operation(self, kind: str, path: str | None) -> Iterator[bool]:
        """Count an operation and let it fail if it is to; yields whether a write takes only half of its bytes."""
        with self._lock:
            yield self._strike(kind, path)

    def _strike(self, kind: str, path: str | None) -> bool:
        if self.dead:
            raise Killed(kind)
        self.count += 1
        self.writes += kind == "write"
        self.renames += kind == "rename"
        fault = self.fault
        if fault is None:
            return False
        if fault.kind == "rename":
            if kind == "rename" and (self.renames == fault.at or (self.renames > fault.at and fault.forever)):
                self.struck = True
                raise _error(errno.ENOSPC, path)
            return False
        if fault.kind == "short":
            if kind == "write" and self.writes == fault.at:
                self.struck = self.full = True
                return True
            if self.full and kind in TAKES_ROOM:
                self.full = fault.forever
                raise _error(errno.ENOSPC, path)
            self.full = self.full and (fault.forever or kind == "write")
            return False
        if self.count == fault.at or (self.count > fault.at and fault.forever):
            self.struck = True
            if fault.kind == "killed":
                self.dead = True
                raise Killed(f"{kind} {path or ''}")
            raise _error(getattr(errno, fault.kind), path)
        return False

    # What the calls of `os` become. A path outside, or a handle of no file of ours, is passed on.

    def _os_open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        whole = self._inside(path, dir_fd)
        if whole is None:
            return int(self._real["open"](path, flags, mode, dir_fd=dir_fd))
        there = os.path.exists(whole)
        creates = bool(flags & os.O_CREAT) and not there
        with self._operation("create" if creates else "open", whole):
            handle: int = self._real["open"](path, flags, mode)
            if creates:
                number = self._number(os.fstat(handle), new=True)
                self.log.append(Op("create", whole, number, self._place(whole)))
            elif flags & os.O_TRUNC and (known := self._known(handle)) is not None:
                self.log.append(Op("truncate", whole, known, offset=0))
            return handle

    def _os_write(self, handle: int, data: Any) -> int:
        number = self._known(handle)
        if number is None:
            return int(self._real["write"](handle, data))
        data = bytes(data)
        with self._operation("write", None) as half:
            data = data[: len(data) // 2] if half else data
            before = os.lseek(handle, 0, os.SEEK_CUR)
            written: int = self._real["write"](handle, data)
            offset = os.lseek(handle, 0, os.SEEK_CUR) - written  # in append mode this is not `before`
            assert offset >= before or written == 0
            self.log.append(Op("write", "", number, data=data[:written], offset=offset))
            return written

    def _os_close(self, handle: int) -> None:
        ours = self._known(handle) is not None
        self._real["close"](handle)  # the system closes it, however the process ends
        if ours and self.dead:
            raise Killed("close")

    def _fsync(self, handle: Any) -> None:
        handle = handle if isinstance(handle, int) else handle.fileno()
        number = self._known(handle)
        if number is None:
            self._real["fsync"](handle)
            return
        with self._operation("fsync", None):
            self.log.append(Op("fsync", "", number))

    def _rename(
        self, source: Any, target: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
    ) -> None:
        old, new = self._inside(source, src_dir_fd), self._inside(target, dst_dir_fd)
        if old is None and new is None:
            self._real["rename"](source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            return
        assert old is not None, "a rename into the disk"
        assert new is not None, "a rename out of the disk"
        with self._operation("rename", old):
            number = self._number(os.lstat(old)) if os.path.lexists(old) else -1
            if self.overlay and number in self.first and self.first[number].kind == "folder":
                raise _error(errno.EXDEV, old)
            over = os.lstat(new) if number >= 0 and os.path.lexists(new) else None
            same = over is not None and os.path.samestat(os.lstat(old), over)
            self._real["replace"](source, target)
            if not same:  # two names of one file: POSIX leaves both
                self._forget(over)
                self.log.append(Op("rename", old, number, self._place(old), self._place(new)))

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._take_away("unlink", path, dir_fd)

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._take_away("rmdir", path, dir_fd)

    def _take_away(self, kind: str, path: Any, dir_fd: int | None) -> None:
        whole = self._inside(path, dir_fd)
        if whole is None:
            self._real[kind](path, dir_fd=dir_fd)
            return
        with self._operation(kind, whole):
            state = os.lstat(whole) if os.path.lexists(whole) else None
            number = self._number(state) if state else -1
            self._real[kind](path)
            self._forget(state)
            self.log.append(Op(kind, whole, number, self._place(whole)))

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._make("mkdir", path, dir_fd, b"", lambda: self._real["mkdir"](path, mode, dir_fd=dir_fd))

    def _symlink(self, source: Any, path: Any, target_is_directory: bool = False, *, dir_fd: int | None = None) -> None:
        call = self._real["symlink"]
        self._make("symlink", path, dir_fd, os.fsencode(source), lambda: call(source, path, target_is_directory))

    def _link(self, source: Any, path: Any, **options: Any) -> None:
        whole = self._inside(path)
        if whole is None:
            self._real["link"](source, path, **options)
            return
        with self._operation("link", whole):
            self._real["link"](source, path, **options)
            self.log.append(Op("link", whole, self._number(os.lstat(whole)), self._place(whole)))

    def _make(self, kind: str, path: Any, dir_fd: int | None, data: bytes, call: Callable[[], None]) -> None:
        whole = self._inside(path, dir_fd)
        if whole is None:
            call()
            return
        with self._operation(kind, whole):
            call()
            number = self._number(os.lstat(whole), new=True)
            self.log.append(Op(kind, whole, number, self._place(whole), data=data))

    def _truncate(self, which: Any, length: int) -> None:
        if isinstance(which, int):
            number, whole, name = self._known(which), None, "ftruncate"
        else:
            whole, name = self._inside(which), "truncate"
            number = self._number(os.stat(whole)) if whole and os.path.exists(whole) else None
        if number is None:
            self._real[name](which, length)
            return
        with self._operation("truncate", whole):
            self._real[name](which, length)
            self.log.append(Op("truncate", whole or "", number, offset=length))

    def _rmtree(self, path: Any, ignore_errors: bool = False, onerror: Any = None, **options: Any) -> None:
        """`shutil.rmtree` by whole paths: the real one works through handles of folders."""
        if self._inside(path) is None:
            self._real["rmtree"](path, ignore_errors, onerror, **options)
            return
        assert onerror is None, "an error handler is not supported"
        assert not options, "options of rmtree are not supported"
        self._empty(os.fspath(path), ignore_errors)

    def _empty(self, path: str, ignore_errors: bool) -> None:
        def attempt(call: Callable[[str], Any], at: str) -> Any:
            try:
                return call(at)
            except OSError:
                if not ignore_errors:
                    raise
                return []

        for name in sorted(attempt(os.listdir, path)):
            inner = os.path.join(path, name)
            if os.path.isdir(inner) and not os.path.islink(inner):
                self._empty(inner, ignore_errors)
            else:
                attempt(self._unlink, inner)
        attempt(self._rmdir, path)

    def _open(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        changes = bool(set(mode) & set("wax+"))
        whole = self._inside(file)
        ours = isinstance(file, int) and not isinstance(file, bool) and self._known(file) is not None
        if not changes or not (whole or ours):
            if whole is not None:
                self._strike("open", whole)
            return self._real["file"](file, mode, buffering, encoding, errors, newline, closefd, opener)
        if ours:
            return File(self, file, str(file), mode, buffering, encoding, closefd)
        flags = os.O_RDWR if "+" in mode else os.O_WRONLY
        flags |= {"w": os.O_CREAT | os.O_TRUNC, "a": os.O_CREAT | os.O_APPEND, "x": os.O_CREAT | os.O_EXCL, "r": 0}[
            next(letter for letter in mode if letter in "waxr")
        ]
        assert opener is None, "an opener is not supported"
        handle = self._os_open(file, flags | getattr(os, "O_CLOEXEC", 0), 0o666)
        return File(self, handle, os.fspath(file), mode, buffering, encoding)


def _error(number: int, path: str | None) -> OSError:
    """What the system raises: calls on a handle do not know the name of the file."""
    return OSError(number, os.strerror(number), *([path] if path else []))


class File:
    """A file open for writing on a `Disk`. Holds back what was written until a flush, as Python's own does."""

    def __init__(
        self,
        disk: Disk,
        handle: int,
        name: str,
        mode: str,
        buffering: int = -1,
        encoding: str | None = None,
        closefd: bool = True,
    ) -> None:
        self.name, self.mode, self.closed = name, mode, False
        self._disk, self._handle, self._closefd = disk, handle, closefd
        self._held, self._room = b"", 0 if buffering == 0 else BUFFER
        self._encoding = None if "b" in mode else encoding or "utf-8"
        if "a" in mode:
            os.lseek(handle, 0, os.SEEK_END)

    def fileno(self) -> int:
        if self.closed:
            raise ValueError("I/O operation on closed file")
        return self._handle

    def write(self, content: Any) -> int:
        handle = self.fileno()
        data = content.encode(self._encoding) if self._encoding else bytes(content)
        if not self._room:
            return self._disk._os_write(handle, data)
        self._held += data
        if len(self._held) >= self._room:
            self.flush()
        return len(content)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        handle = self.fileno()
        while self._held:
            self._held = self._held[self._disk._os_write(handle, self._held) :]

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.flush()
        return os.lseek(self._handle, offset, whence)

    def tell(self) -> int:
        return os.lseek(self.fileno(), 0, os.SEEK_CUR) + len(self._held)

    def truncate(self, size: int | None = None) -> int:
        self.flush()
        size = self.tell() if size is None else size
        self._disk._truncate(self.fileno(), size)
        return size

    def read(self, size: int = -1) -> Any:
        self.flush()
        pieces = []
        while size and (piece := os.read(self._handle, size if size > 0 else BUFFER)):
            pieces.append(piece)
            size -= len(piece) if size > 0 else 0
        content = b"".join(pieces)
        return content.decode(self._encoding) if self._encoding else content

    def close(self) -> None:
        if self.closed:
            return
        try:
            if not self._disk.dead:
                self.flush()
            self._disk._strike("close", None)
        finally:
            self.closed = True
            if self._closefd:
                self._disk._real["close"](self._handle)

    def readable(self) -> bool:
        return "+" in self.mode

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self.closed and self._closefd:
            self._disk._real["close"](self._handle)
