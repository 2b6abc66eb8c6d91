"""Durable files under faults: after any failing call the old content is complete or the new one is."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from durable import NEW, OLD, fill, read_files, write_folder, write_one, write_record, write_several

from llm import storage
from llm.errors import UserError
from llm.storage import files


class FailingDisk:
    """Make the k-th file operation fail, once or from then on, and count all operations."""

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
    """Wrap a file whose write may fail after half of the bytes, as on a full disk."""

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


def fail_each_operation(tmp_path, forever, work, check, prepare=fill, most=200):
    """Run `work` with the k-th operation failing, for every k until none fails; return the number of operations."""
    for k in range(1, most):
        folder = tmp_path / f"{k}-{forever}"
        prepare(folder)
        with pytest.MonkeyPatch.context() as monkeypatch:
            broken = FailingDisk(monkeypatch, k, forever)
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
def test_a_file_has_the_old_or_the_new_content(tmp_path, work, forever):
    new = b"new" if work is write_one else b'{\n  "new": 1\n}\n'

    def check(folder, failed):
        content = read_files(folder)
        left = set(content) - set(OLD)
        assert not left or forever  # if every later call fails, so does the unlink
        assert content["a.txt"] in ((OLD["a.txt"], new) if failed else (new,))
        assert content["b.txt"] == OLD["b.txt"]

    assert fail_each_operation(tmp_path, forever, work, check) >= 5  # open, write, flush, rename, folder


@pytest.mark.parametrize("forever", [False, True])
def test_a_transaction_replaces_all_files_or_none(tmp_path, forever):
    outcomes = set()

    def check(folder, failed):
        interrupted = storage.unfinished(folder)
        storage.recover(folder)
        assert not storage.unfinished(folder)
        content = read_files(folder)
        assert content in ((OLD, OLD | NEW) if failed else (OLD | NEW,))
        assert sorted(os.listdir(folder)) == sorted(OLD)
        outcomes.add((failed, interrupted, content == OLD))

    assert fail_each_operation(tmp_path, forever, write_several, check) >= 15
    assert {(True, True, False), (False, False, False)} <= outcomes  # completed by recovery; not interrupted
    assert (True, forever, True) in outcomes  # undone by recovery


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("forever", [False, True])
def test_a_folder_is_complete_or_absent(tmp_path, before, forever):
    def prepare(folder):
        fill(folder)
        if before:
            with storage.folder_in_place(folder / "state") as first:
                storage.write_bytes(first / "a.txt", b"first")

    def check(folder, failed):
        state = folder / "state"
        if forever and failed and not state.exists():  # it could not be put back: it is set aside, complete
            aside = list(folder.glob(".state.old-*"))
            assert len(aside) == before
            for old in aside:
                storage.verify_folder(old)
            return
        assert state.exists() or (failed and not before)
        if state.exists():
            storage.verify_folder(state)
            content = {name: text for name, text in read_files(state).items() if name != "manifest.json"}
            assert content in (({"a.txt": b"first"}, NEW) if failed and before else (NEW,))
        left = {name for name in os.listdir(folder) if ".tmp-" in name}
        assert not left or forever

    assert fail_each_operation(tmp_path, forever, write_folder, check, prepare) >= 12


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
        assert read_files(folder) == OLD
        assert sorted(os.listdir(folder)) == sorted(OLD)


def test_a_name_appears_only_when_the_block_ends(tmp_path):
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


def test_files_are_flushed_before_they_are_renamed(tmp_path, monkeypatch):
    """Surviving a power cut requires this order: flush the file, rename it, flush the folder."""
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


def test_recovery_completes_a_committed_transaction_and_undoes_another(tmp_path):
    fill(tmp_path / "d")
    fill(tmp_path / "d" / ".preparing", {"a.txt": b"half"})
    assert storage.unfinished(tmp_path / "d")
    storage.recover(tmp_path / "d")
    assert read_files(tmp_path / "d") == OLD
    fill(tmp_path / "d" / ".prepared", NEW)
    assert storage.unfinished(tmp_path / "d")
    storage.recover(tmp_path / "d")
    assert read_files(tmp_path / "d") == OLD | NEW
    fill(tmp_path / "d" / ".prepared", {"b.txt": b"last"})  # a.txt is already in place
    storage.recover(tmp_path / "d")
    assert read_files(tmp_path / "d") == OLD | NEW | {"b.txt": b"last"}
    assert not storage.unfinished(tmp_path / "d")


def test_a_kill_in_the_middle_of_a_commit(tmp_path):
    """Kill a real process between the commit and the move of the last file."""
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
    assert read_files(tmp_path / "d") == OLD | {"a.txt": NEW["a.txt"]}  # a mixture, which `unfinished` detects
    assert storage.unfinished(tmp_path / "d")
    storage.recover(tmp_path / "d")
    assert read_files(tmp_path / "d") == OLD | NEW


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


def test_too_little_disk_space_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"MiB free, .* MiB needed"):
        storage.check_writable(tmp_path / "new", needed=2**70)
    assert not (tmp_path / "new").exists()


def test_sha256_equals_hashlib(tmp_path):
    content = os.urandom(files._CHUNK_BYTES * 2 + 5)
    (tmp_path / "f").write_bytes(content)
    assert storage.sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_the_cache_folder(monkeypatch):
    monkeypatch.setenv("LOSSCURVE_CACHE", "mine")
    assert storage.cache_folder() == Path("mine")
    monkeypatch.delenv("LOSSCURVE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "xdg")
    assert storage.cache_folder() == Path("xdg", "losscurve")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "home")
    assert storage.cache_folder() == Path("home", ".cache", "losscurve")


def test_a_new_folder_appears_when_it_is_complete(tmp_path):
    final, hidden = tmp_path / "run", tmp_path / ".run.new"
    hidden.mkdir()
    (hidden / "half").write_bytes(b"half")  # as a kill leaves it
    (hidden / "state").mkdir()
    with storage.new_folder(final) as folder:
        storage.write_bytes(folder / "a", b"whole")
        assert not final.exists()
        with pytest.raises(storage.InUse, match="in use by another process"), storage.new_folder(final):
            pass
    assert {path.name for path in final.iterdir()} == {"a", ".lock"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    with pytest.raises(UserError, match="another process wrote to it"), storage.new_folder(final):
        pass
    assert (final / "a").read_bytes() == b"whole"
    with pytest.raises(ZeroDivisionError), storage.new_folder(tmp_path / "other"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("content", [None, "[1]", "null", '{"half": ', "\x00"])
def test_facts_that_are_lost_or_damaged_are_none(tmp_path, content):
    path = tmp_path / "env.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert storage.read_facts(path) == {}
    path.write_text('{"torch": "2"}', encoding="utf-8")
    assert storage.read_facts(path) == {"torch": "2"}
