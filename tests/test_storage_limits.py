"""The lock of a folder, and file systems that do not support locks, fsync or renames of folders."""

import errno
import fcntl
import os
import stat
import subprocess
import sys

import pytest
from conftest import flags
from durable import fill, write_folder, write_one, write_several

from llm import storage
from llm.errors import UserError
from llm.storage import filesystem_limits

HOLD = (
    "import sys; from pathlib import Path; from llm import storage\n"
    "with storage.locked(Path(sys.argv[1]), 'this run folder'):\n"
    "    print('held', flush=True); sys.stdin.read()\n"
)


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="this run folder is in use by another process"):
            storage.locked(tmp_path, "this run folder").__enter__()
        holder.kill()
    with storage.locked(tmp_path, "this run folder"):
        with pytest.raises(UserError), storage.locked(tmp_path, "this run folder"):
            pass
        other = subprocess.run(
            [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        assert b"in use by another process" in other.stderr
    with storage.locked(tmp_path, "this run folder"):
        pass


def test_an_error_under_the_lock_is_raised_unchanged_and_frees_the_lock(tmp_path):
    with pytest.raises(OSError, match="mine"), storage.locked(tmp_path, "x"):
        raise OSError("mine")
    with storage.locked(tmp_path, "x"):
        pass


@pytest.fixture
def break_call(monkeypatch):
    """`break_call(os, "fsync", errno.EINVAL)` makes the call raise that error if `when(its first argument)` is true."""

    def replace(owner, name, number, when=lambda _what: True):
        call = getattr(owner, name)

        def replaced(what, *args, **kwargs):
            if when(what):
                raise OSError(number, os.strerror(number))
            return call(what, *args, **kwargs)

        monkeypatch.setattr(owner, name, replaced)

    return replace


def is_folder(handle):
    return stat.S_ISDIR(os.stat(handle).st_mode)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_a_file_system_without_locks_is_used_and_reported_once(tmp_path, break_call, number):
    break_call(fcntl, "flock", number)
    for name in ("a", "b"):
        with storage.locked(tmp_path / name, "this run folder"):
            storage.write_bytes(tmp_path / name / "f", b"1")
    cause = (
        "this file system does not support file locks: nothing keeps a second run out of this folder; "
        "start one at a time"
    )
    assert storage.limits() == [f"{tmp_path / 'a'}: {cause} ({os.strerror(number)})"]
    assert storage.limits() == []


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES])
def test_a_held_lock_is_reported_as_in_use(tmp_path, break_call, number):
    break_call(fcntl, "flock", number)
    with pytest.raises(UserError, match="in use by another process"), storage.locked(tmp_path, "this run folder"):
        pass


def test_another_error_of_the_lock_names_the_lock_file(tmp_path, break_call):
    break_call(fcntl, "flock", errno.EIO)
    with pytest.raises(OSError, match="Input/output error") as caught, storage.locked(tmp_path, "this run folder"):
        pass
    assert caught.value.filename == str(tmp_path / ".lock")


WRITES = [write_one, write_several, write_folder]


@pytest.mark.parametrize("work", WRITES)
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF])
def test_folders_that_cannot_be_flushed_are_reported_once(tmp_path, break_call, number, work):
    fill(tmp_path / "d")
    break_call(os, "fsync", number, is_folder)
    work(tmp_path / "d")
    limits = storage.limits()
    assert len(limits) == 1
    assert "this file system does not support fsync on folders: a power cut may undo the last saves" in limits[0]
    assert os.strerror(number) in limits[0]


def test_folders_that_cannot_be_opened_are_not_flushed(tmp_path, break_call):
    break_call(os, "open", errno.EISDIR, lambda path: os.path.isdir(path))
    storage.write_bytes(tmp_path / "d" / "f", b"1")
    assert "does not support fsync on folders" in storage.limits()[0]


@pytest.mark.parametrize("work", WRITES)
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_files_that_cannot_be_flushed_are_reported_once(tmp_path, break_call, number, work):
    fill(tmp_path / "d")
    break_call(os, "fsync", number, lambda handle: not is_folder(handle))
    work(tmp_path / "d")
    limits = storage.limits()
    assert len(limits) == 1
    assert "this file system does not support fsync on files: a power cut may lose what was saved" in limits[0]


@pytest.mark.parametrize("work", WRITES)
@pytest.mark.parametrize("when", [is_folder, lambda handle: not is_folder(handle)])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_failed_flush_raises(tmp_path, break_call, number, when, work):
    fill(tmp_path / "d")
    break_call(os, "fsync", number, when)
    with pytest.raises(OSError, match=os.strerror(number)):
        work(tmp_path / "d")
    assert storage.limits() == []


def test_a_run_reports_the_limits_of_its_file_system_once(here, losscurve, break_call, monkeypatch):
    break_call(fcntl, "flock", errno.ENOSYS)
    break_call(storage, "remove_folder", errno.EBUSY)
    code, _, err = losscurve(f"train --text text.txt {flags(max_steps=4, eval_every=1, keep=1)}")
    assert code == 0
    assert err.count("not support file locks") == err.count("old checkpoints could not be removed") == 1
    monkeypatch.setattr(filesystem_limits, "_recorded", set())  # another process
    code, _, err = losscurve("train --resume --max_steps 5")
    assert code == 0
    assert err.count("not support file locks") == err.count("old checkpoints could not be removed") == 1
