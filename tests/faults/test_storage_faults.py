"""Every operation fails once, in every way, and the power is cut after every one: no promise of storage breaks."""

import errno
import io
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from llm import storage
from llm.storage import checkpoint
from tests.faults import checks, power
from tests.faults.disk import Disk, Fault, Killed

TORTURE = bool(os.environ.get("LOSSCURVE_TORTURE"))
# one best and none, one kept and two: make torture takes every sequence of saves
SAVES = checks.SAVES if TORTURE else [checks.SAVES[3], checks.SAVES[5]]
FAULTY = [*checks.STORAGE, checks.RECORD, checks.FOLDER_INSISTED, checks.OVERLAY, *SAVES]


@pytest.mark.parametrize("scenario", FAULTY, ids=str)
def test_every_operation_may_fail(tmp_path, scenario, record_property):
    ends = checks.survives_faults(scenario, tmp_path, checks.MODES if TORTURE else checks.FEWER)
    record_property("failed or killed operations", ends.total())
    assert ends["killed"] >= 8
    assert ends.total() >= 24
    assert set(ends) <= {"killed", "failed", "done"}


def test_a_record_is_as_it_was_after_a_failure(tmp_path):
    assert checks.survives_faults(checks.RECORD_GOES_ON, tmp_path)["done"] >= 6


@pytest.mark.parametrize("scenario", [*checks.STORAGE, checks.RECORD_FLUSHED, checks.OVERLAY, *checks.SAVES], ids=str)
def test_the_power_may_go_at_any_moment(tmp_path, scenario, record_property):
    trees = checks.survives_power_cuts(scenario, tmp_path)
    assert trees >= 7
    record_property("trees after a power cut", trees)


def test_only_one_holds_the_lock(tmp_path):
    checks.one_holder(tmp_path)


@pytest.fixture
def overlay(tmp_path):
    """`overlay(folder)`: `folder` as the lower layer of an overlay; skipped where mounting is not permitted."""
    merged = tmp_path / "merged"

    def mount(lower: Path) -> Path:
        for name in ("upper", "work", "merged"):
            (tmp_path / name).mkdir()
        layers = f"lowerdir={lower},upperdir={tmp_path / 'upper'},workdir={tmp_path / 'work'}"
        words = ["mount", "-t", "overlay", "-o", layers, "none", str(merged)]
        if subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("mounting an overlay is not permitted here")
        return merged

    yield mount
    if os.path.ismount(merged):
        subprocess.run(["umount", merged], check=True)


def test_an_overlay_of_the_system_is_no_obstacle(tmp_path, overlay):
    """A container that starts from an image with a run and an interrupted preparation in it."""
    lower = tmp_path / "lower"
    checks.two_states(lower / "run")
    storage.write_bytes(lower / "data" / storage.KEPT / "train-00000.bin", b"done")
    merged = overlay(lower)
    with pytest.raises(OSError, match="cross-device"):
        os.replace(merged / "run" / "step-000001", merged / "run" / "other")
    assert checkpoint.set_aside(merged / "run" / "step-000001").name == "damaged-step-000001"
    checks._save_over(merged / "run", lambda mark: None)
    assert checkpoint.saved_steps(merged / "run") == [3]
    assert sorted(os.listdir(merged / "run")) == [".lock", "damaged-step-000001", "step-000003"]
    storage.verify_folder(merged / "run" / "damaged-step-000001")
    with storage.transaction(merged / "data", keep=True) as staging:
        storage.write_bytes(staging / "meta.json", b"{}")
    assert sorted(os.listdir(merged / "data")) == ["meta.json", "train-00000.bin"]


# The disk itself.


def work_of_all_kinds(root):
    """One of each operation, the way the library and others reach them."""
    (root / "d" / "e").mkdir(parents=True)
    with open(root / "d" / "one", "wb") as file:
        file.write(b"12345")
        file.seek(1)
        file.write(b"x")
        file.truncate(4)
    with open(root / "d" / "one", "a", encoding="utf-8") as file:
        file.write("é\n")
    with open(root / "d" / "one", "r+b") as file:
        assert file.read(2) == b"1x"
        file.write(b"y")
    (root / "d" / "two").write_text("two", encoding="utf-8")
    (root / "d" / "three").touch()
    handle = os.open(root / "d" / "three", os.O_WRONLY | os.O_APPEND)
    os.write(handle, b"3")
    os.fsync(handle)
    os.ftruncate(handle, 5)
    os.close(handle)
    os.truncate(root / "d" / "two", 1)
    os.replace(root / "d" / "two", root / "d" / "e" / "moved")
    (root / "d" / "three").rename(root / "d" / "one")
    (root / "link").symlink_to("d/one")
    os.link(root / "d" / "one", root / "hard")
    (root / "d" / "e" / "moved").unlink()
    (root / "d" / "e").rmdir()
    with open(root / "tensors.pt", "wb") as file:
        torch.save({"w": torch.arange(5000)}, file)
    (root / "gone" / "deep").mkdir(parents=True)
    (root / "gone" / "deep" / "file").write_bytes(b"1")
    shutil.rmtree(root / "gone")


KINDS = {"create", "mkdir", "symlink", "link", "unlink", "rmdir", "rename", "write", "truncate", "fsync"}


def test_the_log_tells_all_that_happened(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "plain").mkdir()
    with Disk(tmp_path / "disk") as disk:
        work_of_all_kinds(tmp_path / "disk")
        disk.mark("done")
        (tmp_path / "beside").write_bytes(b"not ours")
    work_of_all_kinds(tmp_path / "plain")
    assert {op.kind for op in disk.log} == KINDS | {"mark"}
    assert power.as_recorded(disk) == power.found(tmp_path / "disk") == power.found(tmp_path / "plain")
    assert torch.load(tmp_path / "disk" / "tensors.pt")["w"].tolist() == list(range(5000))
    assert disk.marks == ["done"]
    assert (open, os.replace) == (io.open, disk._real["replace"])


def test_what_goes_past_the_disk_is_noticed(tmp_path):
    with Disk(tmp_path) as disk:
        disk._real["mkdir"](tmp_path / "past")
    assert power.as_recorded(disk) != power.found(tmp_path)


@pytest.mark.parametrize("at", [1, 2, 3, 5, 8, 13, 21, 30])
def test_after_a_kill_nothing_changes(tmp_path, at):
    """Up to the kill as recorded; from then on every operation is refused, those of handlers too."""
    root = tmp_path / "disk"
    root.mkdir()
    with Disk(root) as disk:
        work_of_all_kinds(root)
    whole = disk.log
    shutil.rmtree(root)
    root.mkdir()
    with Disk(root, Fault("killed", at)) as disk:
        with pytest.raises(Killed):
            work_of_all_kinds(root)
        for call in (
            lambda: (root / "new").write_bytes(b""),
            lambda: os.open(root / "new", os.O_CREAT),
            lambda: os.mkdir(root / "new"),
            lambda: shutil.rmtree(root, ignore_errors=True) or (root / "x").touch(),
            lambda: os.replace(root / "a", root / "b"),
            lambda: disk.mark("promised by a dead process"),
        ):
            with pytest.raises(Killed):
                call()
    assert power.found(root) == power.as_recorded(disk)
    assert [(op.kind, op.path, op.data) for op in disk.log] == [
        (op.kind, op.path, op.data) for op in whole[: len(disk.log)]
    ]
    assert len(disk.log) < len(whole)


@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize("kind", ["ENOSPC", "EIO"])
def test_an_operation_fails_once_or_for_good(tmp_path, kind, forever):
    with Disk(tmp_path, Fault(kind, 2, forever)) as disk:
        os.mkdir(tmp_path / "1")
        with pytest.raises(OSError, match="2") as caught:
            os.mkdir(tmp_path / "2")
        assert caught.value.errno == getattr(errno, kind)
        if forever:
            with pytest.raises(OSError, match="1"):
                os.rmdir(tmp_path / "1")
        else:
            os.rmdir(tmp_path / "1")
    assert disk.struck
    assert os.listdir(tmp_path) == ["1"] * forever


@pytest.mark.parametrize("forever", [False, True])
def test_a_full_disk_takes_half(tmp_path, forever):
    with Disk(tmp_path, Fault("short", 2, forever)):
        (tmp_path / "a").write_bytes(b"whole")
        with open(tmp_path / "b", "wb", buffering=0) as file:
            assert file.write(b"12345678") == 4
            with pytest.raises(OSError, match="space"):
                file.write(b"5678")
        (tmp_path / "a").unlink()
        if forever:
            with pytest.raises(OSError, match="space"):
                (tmp_path / "c").touch()
        else:
            (tmp_path / "c").write_bytes(b"y")
    assert (tmp_path / "b").read_bytes() == b"1234"
    assert (tmp_path / "c").exists() != forever


def test_a_buffered_write_raises_and_leaves_half(tmp_path):
    with Disk(tmp_path, Fault("short", 1)), open(tmp_path / "a", "wb") as file:
        file.write(b"12345678")
        with pytest.raises(OSError, match="space"):
            file.flush()
        assert (tmp_path / "a").stat().st_size == 4
    assert (tmp_path / "a").read_bytes() == b"12345678"  # closing tries again, and there is room


def test_threads_share_a_disk(tmp_path):
    def work(name):
        for n in range(20):
            storage.write_bytes(tmp_path / name, bytes([n]) * 100)
            seen.append(name)

    for at in (None, 150):
        seen = []
        with Disk(tmp_path, Fault("killed", at) if at else None) as disk:
            threads = [threading.Thread(target=swallow, args=(work, f"{at}-{n}")) for n in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert power.as_recorded(disk) == power.found(tmp_path)
        assert (len(seen) == 80) == (at is None)


def swallow(work, name):
    try:
        work(name)
    except Killed:
        return


# The power cuts.


def cuts(tmp_path, work):
    """Every tree that a cut may leave, with how often something was promised before it."""
    root = tmp_path / "disk"
    root.mkdir()
    (root / "old").write_bytes(b"old")
    with Disk(root) as disk:
        work(root, disk)
    return [(len(cut.promised), power.found(tree)) for cut, tree in power.power_cuts(disk, tmp_path / "cuts")]


def sync(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def test_bytes_that_were_not_flushed_may_be_lost_torn_or_zero(tmp_path):
    def work(root, disk):
        with open(root / "old", "r+b") as file:
            file.write(b"newer!")
            file.flush()
            os.fsync(file.fileno())
            disk.mark("flushed")
            file.write(b" more")

    ends = cuts(tmp_path, work)
    assert {tree["old"][1] for promised, tree in ends if not promised} == {b"old", b"new", b"newer!", bytes(6)}
    assert {tree["old"][1] for promised, tree in ends if promised} == {
        b"newer!",
        b"newer! m",
        b"newer! more",
        b"newer!" + bytes(5),
    }


@pytest.mark.parametrize("synced", [False, True])
def test_a_name_is_safe_when_its_folder_was_flushed(tmp_path, synced):
    def work(root, disk):
        (root / "d").mkdir()
        sync(root)
        (root / "d" / "new").write_bytes(b"")
        (root / "old").unlink()
        for folder in (root, root / "d") if synced else ():
            sync(folder)
        disk.mark("done")

    ends = {tuple(sorted(tree)) for promised, tree in cuts(tmp_path, work) if promised}
    safe = ("d", "d/new")
    assert ends == ({safe} if synced else {safe, ("d", "old"), ("d",), ("d", "d/new", "old")})


def test_renames_come_in_any_order_and_never_halved(tmp_path):
    def work(root, disk):
        (root / "a").write_bytes(b"a")
        (root / "d").mkdir()
        with open(root / "a", "rb") as file:
            os.fsync(file.fileno())
        sync(root)
        disk.mark("start")
        os.rename(root / "a", root / "d" / "b")
        os.rename(root / "old", root / "aside")

    ends = {tuple(sorted(tree)) for promised, tree in cuts(tmp_path, work) if promised}
    assert ends == {
        ("a", "d", "old"),
        ("d", "d/b", "old"),
        ("a", "aside", "d"),
        ("aside", "d", "d/b"),
    }


def test_a_folder_that_is_gone_for_good_took_its_files_along(tmp_path):
    def work(root, disk):
        (root / "d").mkdir()
        (root / "d" / "file").write_bytes(b"1")
        sync(root / "d")
        sync(root)
        shutil.rmtree(root / "d")
        sync(root)
        disk.mark("gone")

    assert {tuple(tree) for promised, tree in cuts(tmp_path, work) if promised} == {("old",)}


def test_a_file_written_the_naive_way_is_lost(tmp_path):
    """The harness finds what it was made for: open, write, rename."""

    def work(folder: Path, promise: checks.Promise) -> None:
        (folder / "new").write_bytes(checks.NEW)
        os.replace(folder / "new", folder / "a.txt")
        promise("written")

    scenario = checks.Scenario("naive", checks._a_file, work, checks._old_or_new, checks._write_once_more)
    with pytest.raises(AssertionError, match="naive: Cut"):
        checks.survives_power_cuts(scenario, tmp_path)
