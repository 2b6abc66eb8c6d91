"""Durable files against faults: after any failing call the old content is there or the new, whole."""

import errno
import fcntl
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import flags

from llm import storage
from llm.errors import UserError
from llm.storage import files
from llm.storage import lacking as lacking_calls

OLD, NEW = {"a.txt": b"old a", "b.txt": b"old b", "c.txt": b"stays"}, {"a.txt": b"new", "b.txt": b"b new and longer"}


class Broken:
    """The k-th file operation fails, once or from then on; counts them all."""

    def __init__(self, monkeypatch, k, forever):
        self.k, self.forever, self.count = k, forever, 0
        for name in ("replace", "rename", "fsync", "open", "mkdir", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))
        monkeypatch.setattr("builtins.open", self.opened(open))

    def fails(self):
        self.count += 1
        return self.count == self.k or (self.forever and self.count > self.k)

    def wrap(self, name, call):
        def broken(*args, **kwargs):
            if self.fails():
                raise OSError(errno.EIO, f"{name} fails")
            return call(*args, **kwargs)

        return broken

    def opened(self, call):
        def broken(path, mode="r", *args, **kwargs):
            if self.fails():
                raise OSError(errno.ENOSPC, "open fails")
            file = call(path, mode, *args, **kwargs)
            return Writer(file, self) if "w" in mode else file

        return broken


class Writer:
    """A file whose write may fail after half of the bytes, as on a full disk."""

    def __init__(self, file, broken):
        self.file, self.broken = file, broken

    def write(self, content):
        if self.broken.fails():
            self.file.write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "write fails")
        return self.file.write(content)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def fill(folder, content=OLD):
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_bytes(text)


def found(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def write_one(folder):
    storage.write_bytes(folder / "a.txt", b"new")


def write_record(folder):
    storage.write_json(folder / "a.txt", {"new": 1})


def write_several(folder):
    with storage.transaction(folder) as staging:
        for name, text in NEW.items():
            storage.write_bytes(staging / name, text)


def write_folder(folder):
    with storage.folder_in_place(folder / "state") as new:
        for name, text in NEW.items():
            storage.write_bytes(new / name, text)


def until_it_passes(tmp_path, forever, work, check, prepare=fill, most=200):
    """Run `work` with the k-th operation failing, for every k until none fails; returns how many there were."""
    for k in range(1, most):
        folder = tmp_path / f"{k}-{forever}"
        prepare(folder)
        with pytest.MonkeyPatch.context() as monkeypatch:
            broken = Broken(monkeypatch, k, forever)
            try:
                work(folder)
                failed = False
            except OSError:
                failed = True
        check(folder, failed)
        if broken.count < k:
            assert not failed
            return k - 1
    raise AssertionError("it never passed")


@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize("work", [write_one, write_record])
def test_a_file_is_old_or_new(tmp_path, work, forever):
    new = b"new" if work is write_one else b'{\n  "new": 1\n}\n'

    def check(folder, failed):
        content = found(folder)
        left = set(content) - set(OLD)
        assert not left or forever  # where every later call fails, the unlink does too
        assert content["a.txt"] in ((OLD["a.txt"], new) if failed else (new,))
        assert content["b.txt"] == OLD["b.txt"]

    assert until_it_passes(tmp_path, forever, work, check) >= 5  # open, write, flush, rename, folder


@pytest.mark.parametrize("forever", [False, True])
def test_several_files_are_old_or_new_together(tmp_path, forever):
    outcomes = set()

    def check(folder, failed):
        interrupted = storage.unfinished(folder)
        storage.recover(folder)
        assert not storage.unfinished(folder)
        content = found(folder)
        assert content in ((OLD, OLD | NEW) if failed else (OLD | NEW,))
        assert sorted(os.listdir(folder)) == sorted(OLD)
        outcomes.add((failed, interrupted, content == OLD))

    assert until_it_passes(tmp_path, forever, write_several, check) >= 15
    assert {(True, True, False), (False, False, False)} <= outcomes  # rolled forward; clean
    assert (True, forever, True) in outcomes  # undone


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("forever", [False, True])
def test_a_folder_is_whole_or_absent(tmp_path, before, forever):
    def prepare(folder):
        fill(folder)
        if before:
            with storage.folder_in_place(folder / "state") as first:
                storage.write_bytes(first / "a.txt", b"first")

    def check(folder, failed):
        state = folder / "state"
        if forever and failed and not state.exists():  # it could not even be put back: it stands aside, whole
            aside = list(folder.glob(".state.old-*"))
            assert len(aside) == before
            for old in aside:
                storage.verify_folder(old)
            return
        assert state.exists() or (failed and not before)
        if state.exists():
            storage.verify_folder(state)
            content = {name: text for name, text in found(state).items() if name != "manifest.json"}
            assert content in (({"a.txt": b"first"}, NEW) if failed and before else (NEW,))
        left = {name for name in os.listdir(folder) if ".tmp-" in name}
        assert not left or forever

    assert until_it_passes(tmp_path, forever, write_folder, check, prepare) >= 12


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
def test_an_exception_in_the_block_changes_nothing(tmp_path, error):
    folder = tmp_path / "d"
    fill(folder)
    for context in (
        lambda: storage.writing(folder / "a.txt"),
        lambda: storage.transaction(folder),
        lambda: storage.folder_in_place(folder / "a"),
    ):

        def work(context=context):
            with context() as place:
                place.write(b"half") if hasattr(place, "fileno") else (place / "a.txt").write_bytes(b"half")
                raise error

        with pytest.raises(error):
            work()
        assert found(folder) == OLD
        assert sorted(os.listdir(folder)) == sorted(OLD)


def test_nothing_is_under_its_name_before_the_end(tmp_path):
    with storage.writing(tmp_path / "x" / "file") as file:
        file.write(b"1")
        file.flush()
        assert not (tmp_path / "x" / "file").exists()
    assert (tmp_path / "x" / "file").read_bytes() == b"1"
    with storage.folder_in_place(tmp_path / "state") as new:
        (new / "f").write_bytes(b"1")
        assert not (tmp_path / "state").exists()
    assert json.loads((tmp_path / "state" / "manifest.json").read_text()) == {
        "files": {"f": {"size": 1, "sha256": hashlib.sha256(b"1").hexdigest()}}
    }


def test_bytes_reach_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    """The order that power loss needs: flush the file, rename, flush the folder."""
    order = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, call=call: (order.append(name), call(*a))[1])
    storage.write_bytes(tmp_path / "f", b"1")
    assert order == ["fsync", "replace", "fsync"]
    order.clear()
    with storage.transaction(tmp_path) as staging:
        (staging / "a").write_bytes(b"1")
        (staging / "b").write_bytes(b"2")
    assert order == ["fsync", "fsync", "fsync", "replace", "fsync", "replace", "replace", "fsync", "fsync"]
    order.clear()
    with storage.folder_in_place(tmp_path / "state") as new:
        (new / "a").write_bytes(b"1")
    assert order == ["fsync", "fsync", "replace", "fsync", "replace", "fsync"]


def test_recovery_finishes_what_was_complete_and_undoes_the_rest(tmp_path):
    fill(tmp_path / "d")
    fill(tmp_path / "d" / ".preparing", {"a.txt": b"half"})
    assert storage.unfinished(tmp_path / "d")
    storage.recover(tmp_path / "d")
    assert found(tmp_path / "d") == OLD
    fill(tmp_path / "d" / ".prepared", NEW)
    assert storage.unfinished(tmp_path / "d")
    storage.recover(tmp_path / "d")
    assert found(tmp_path / "d") == OLD | NEW
    fill(tmp_path / "d" / ".prepared", {"b.txt": b"last"})  # a.txt was in place already
    storage.recover(tmp_path / "d")
    assert found(tmp_path / "d") == OLD | NEW | {"b.txt": b"last"}
    assert not storage.unfinished(tmp_path / "d")


def test_a_killed_process_leaves_old_or_new(tmp_path):
    """A real process, killed between the point of no return and the last file in place."""
    fill(tmp_path / "d")
    code = (
        "import os, sys; from pathlib import Path; from llm import storage\n"
        "folder, real = Path(sys.argv[1]), os.replace\n"
        "def replace(a, b):\n"
        "    real(a, b)\n"
        "    if Path(b).name == 'a.txt' and Path(b).parent == folder: os._exit(9)\n"
        "os.replace = replace\n"
        "with storage.transaction(folder) as staging:\n"
        f"    [(staging / n).write_bytes(c) for n, c in {NEW!r}.items()]\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "d")], check=False).returncode == 9
    assert found(tmp_path / "d") == OLD | {"a.txt": NEW["a.txt"]}  # a mixture, and it is known to be one
    assert storage.unfinished(tmp_path / "d")
    storage.recover(tmp_path / "d")
    assert found(tmp_path / "d") == OLD | NEW


@pytest.fixture
def state(tmp_path):
    with storage.folder_in_place(tmp_path / "state") as folder:
        for name, text in NEW.items():
            (folder / name).write_bytes(text)
    return tmp_path / "state"


def test_any_flipped_bit_is_noticed(state):
    storage.verify_folder(state)
    for path in sorted(state.iterdir()):
        content = path.read_bytes()
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= 1 << (place % 8)
            path.write_bytes(changed)
            with pytest.raises(UserError):
                storage.verify_folder(state)
        path.write_bytes(content)
    storage.verify_folder(state)


@pytest.mark.parametrize("name", [*NEW, "manifest.json"])
@pytest.mark.parametrize("how", ["truncated", "empty", "longer", "removed", "renamed", "linked", "folder"])
def test_a_file_that_is_not_as_it_was_written_is_named(state, tmp_path, name, how):
    path = state / name
    content = path.read_bytes()
    if how in ("truncated", "empty", "longer"):
        path.write_bytes({"truncated": content[:-2], "empty": b"", "longer": content + b"!"}[how])
    elif how == "renamed":
        path.rename(state / "other")
    else:
        path.unlink()
    if how == "linked":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    if how == "folder":
        path.mkdir()
    with pytest.raises(UserError) as caught:
        storage.verify_folder(state)
    assert str(path) in str(caught.value)


def test_an_added_file_and_two_swapped_ones_are_named(state):
    (state / "added").write_bytes(b"")
    with pytest.raises(UserError, match="added: not in the manifest"):
        storage.verify_folder(state)
    (state / "added").rename(state / "x")
    (state / "a.txt").rename(state / "y")
    (state / "x").unlink()
    (state / "b.txt").rename(state / "a.txt")
    (state / "y").rename(state / "b.txt")
    with pytest.raises(UserError, match=r"a\.txt: changed since it was written"):
        storage.verify_folder(state)


@pytest.mark.parametrize("name", ["../secret", "/secret", "..", ".", "", "../state/a.txt", "secret\0", "manifest.json"])
def test_a_name_that_leaves_the_folder_is_refused(state, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_bytes(b"s")
    entry = {"size": 1, "sha256": hashlib.sha256(b"s").hexdigest()}
    for kept in NEW:
        (state / kept).unlink()
    (state / "a.txt").write_bytes(b"s")
    files = {"a.txt": entry}
    (state / "manifest.json").write_text(json.dumps({"files": files}))
    storage.verify_folder(state)
    files[name if name != "/secret" else str(secret)] = entry
    (state / "manifest.json").write_text(json.dumps({"files": files}))
    with pytest.raises(UserError):
        storage.verify_folder(state)


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"files": {}}', '{"files": []}', '{"files": {"a.txt": 3}}'])
def test_a_manifest_that_lists_nothing_is_refused(state, text):
    (state / "manifest.json").write_text(text)
    with pytest.raises(UserError):
        storage.verify_folder(state)


HOSTILE_JSON = {
    "empty": b"",
    "no json": b"{'a': 1}",
    "two values": b"1 2",
    "not utf-8": b'"\xff"',
    "utf-16": '"a"'.encode("utf-16"),
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000,
    "a long number": b"1" * 5000,
}


@pytest.mark.parametrize("content", HOSTILE_JSON.values(), ids=HOSTILE_JSON)
def test_what_is_no_json_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json: not readable as JSON"):
        storage.read_json(tmp_path / "x.json")


def test_what_is_no_file_of_ours_is_not_read(tmp_path):
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(storage.JSON_LIMIT + 1)  # takes no room
    (tmp_path / "link.json").symlink_to(os.devnull)  # another device could be read for ever
    (tmp_path / "folder.json").mkdir()
    for name, reason in {"huge": "larger than", "link": "regular", "folder": "regular"}.items():
        with pytest.raises(UserError, match=rf"{name}\.json: .*{reason}"):
            storage.read_json(tmp_path / f"{name}.json")
    with pytest.raises(UserError, match=r"absent\.json"):
        storage.read_json(tmp_path / "absent.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}, {1: object()}, "\udcff"])
def test_what_json_cannot_say_is_refused_before_the_file_is_touched(tmp_path, value):
    storage.write_json(tmp_path / "x.json", {"é": 1})
    with pytest.raises((ValueError, TypeError)):
        storage.write_json(tmp_path / "x.json", value)
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "é": 1\n}\n'
    assert os.listdir(tmp_path) == ["x.json"]
    assert storage.read_json(tmp_path / "x.json") == {"é": 1}


HOLD = (
    "import sys; from pathlib import Path; from llm import storage\n"
    "with storage.locked(Path(sys.argv[1]), 'this run folder'):\n"
    "    print('held', flush=True); sys.stdin.read()\n"
)


def test_a_second_process_is_refused_and_a_dead_one_is_no_obstacle(tmp_path):
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


def test_an_error_under_the_lock_is_itself_and_frees_it(tmp_path):
    with pytest.raises(OSError, match="mine"), storage.locked(tmp_path, "x"):
        raise OSError("mine")
    with storage.locked(tmp_path, "x"):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    storage.check_writable(tmp_path / "new" / "run", needed=1)
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    for bad in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot write there"):
            storage.check_writable(bad)

    def refuse(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)  # the tests may run as root, who is never refused
    with pytest.raises(UserError, match=r"run: cannot write there \(Permission denied\)"):
        storage.check_writable(tmp_path / "new" / "run")


def test_too_little_room_is_said(tmp_path):
    with pytest.raises(UserError, match=r"MiB free, .* MiB needed"):
        storage.check_writable(tmp_path / "new", needed=2**70)
    assert not (tmp_path / "new").exists()


def test_sha256_is_hashlibs(tmp_path):
    content = os.urandom(files._CHUNK * 2 + 5)
    (tmp_path / "f").write_bytes(content)
    assert storage.sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_where_downloads_are_kept(monkeypatch):
    monkeypatch.setenv("LOSSCURVE_CACHE", "mine")
    assert storage.cache_folder() == Path("mine")
    monkeypatch.delenv("LOSSCURVE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "xdg")
    assert storage.cache_folder() == Path("xdg", "losscurve")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "home")
    assert storage.cache_folder() == Path("home", ".cache", "losscurve")


def test_no_json_is_written_that_would_not_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "JSON_LIMIT", 100)
    path = tmp_path / "a.json"
    storage.write_json(path, ["x" * 80])
    with pytest.raises(OSError, match="too large") as caught:
        storage.write_json(path, ["é" * 50])
    assert caught.value.errno == errno.EFBIG
    assert storage.read_json(path) == ["x" * 80]


# File systems that lack something.


@pytest.fixture
def lacking(monkeypatch):
    """`lacking(os, "fsync", errno.EINVAL)`: that call raises this error, where `when` is true of its first argument."""

    def lack(owner, name, number, when=lambda _what: True):
        call = getattr(owner, name)

        def replaced(what, *args, **kwargs):
            if when(what):
                raise OSError(number, os.strerror(number))
            return call(what, *args, **kwargs)

        monkeypatch.setattr(owner, name, replaced)

    return lack


def is_folder(handle):
    return stat.S_ISDIR(os.stat(handle).st_mode)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_a_file_system_without_locks_is_said_once_and_used(tmp_path, lacking, number):
    lacking(fcntl, "flock", number)
    for name in ("a", "b"):
        with storage.locked(tmp_path / name, "this run folder"):
            storage.write_bytes(tmp_path / name / "f", b"1")
    cause = "this file system has no locks: nothing keeps a second run out of this folder, start one at a time"
    assert storage.limits() == [f"{tmp_path / 'a'}: {cause} ({os.strerror(number)})"]
    assert storage.limits() == []


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES])
def test_a_lock_that_is_held_is_said_to_be(tmp_path, lacking, number):
    lacking(fcntl, "flock", number)
    with pytest.raises(UserError, match="in use by another process"), storage.locked(tmp_path, "this run folder"):
        pass


def test_a_lock_that_fails_otherwise_is_an_error_of_the_file(tmp_path, lacking):
    lacking(fcntl, "flock", errno.EIO)
    with pytest.raises(OSError, match="Input/output error") as caught, storage.locked(tmp_path, "this run folder"):
        pass
    assert caught.value.filename == str(tmp_path / ".lock")


WRITES = [write_one, write_several, write_folder]


@pytest.mark.parametrize("work", WRITES)
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF])
def test_folders_that_cannot_be_flushed_are_said_once(tmp_path, lacking, number, work):
    fill(tmp_path / "d")
    lacking(os, "fsync", number, is_folder)
    work(tmp_path / "d")
    limits = storage.limits()
    assert len(limits) == 1
    assert "this file system flushes no folders: the last saves may be undone by a power cut" in limits[0]
    assert os.strerror(number) in limits[0]


def test_folders_that_cannot_be_opened_are_not_flushed(tmp_path, lacking):
    lacking(os, "open", errno.EISDIR, lambda path: os.path.isdir(path))
    storage.write_bytes(tmp_path / "d" / "f", b"1")
    assert "flushes no folders" in storage.limits()[0]


@pytest.mark.parametrize("work", WRITES)
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_files_that_cannot_be_flushed_are_said_once(tmp_path, lacking, number, work):
    fill(tmp_path / "d")
    lacking(os, "fsync", number, lambda handle: not is_folder(handle))
    work(tmp_path / "d")
    limits = storage.limits()
    assert len(limits) == 1
    assert "this file system flushes no files: what is saved may be lost in a power cut" in limits[0]


@pytest.mark.parametrize("work", WRITES)
@pytest.mark.parametrize("when", [is_folder, lambda handle: not is_folder(handle)])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_flush_that_fails_is_an_error(tmp_path, lacking, number, when, work):
    fill(tmp_path / "d")
    lacking(os, "fsync", number, when)
    with pytest.raises(OSError, match=os.strerror(number)):
        work(tmp_path / "d")
    assert storage.limits() == []


def test_a_run_says_once_what_its_file_system_lacks(here, losscurve, lacking, monkeypatch):
    lacking(fcntl, "flock", errno.ENOSYS)
    lacking(storage, "remove_folder", errno.EBUSY)
    code, _, said = losscurve(f"train --text text.txt {flags(max_steps=4, eval_every=1, keep=1)}")
    assert code == 0
    assert said.count("no locks") == said.count("old states could not be removed") == 1
    monkeypatch.setattr(lacking_calls, "_noted", set())  # another process
    code, _, said = losscurve("train --resume --max_steps 5")
    assert code == 0
    assert said.count("no locks") == said.count("old states could not be removed") == 1
