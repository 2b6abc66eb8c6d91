"""The durability promises of storage and checkpoint, as functions that raise AssertionError where one is broken.

A `Scenario` is a piece of work on a folder. `survives_faults` does it once for every operation and every kind of
fault, `survives_power_cuts` looks at what is left of it by every power cut. After each, the next process takes the
folder's lock, as every command does, and what it finds is judged: the new, verified, or what was there before,
intact; or the caller got a typed error; and never less than was promised.
"""

import errno
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from llm import storage
from llm.errors import Failure, UserError
from llm.record import metrics
from llm.storage import checkpoint
from tests.faults import power
from tests.faults.disk import Disk, Fault, Killed

Promise = Callable[[str], None]
DEAD, NEXT = 999_999_998, 999_999_999  # ids that no process has: of the one that fails, and of the one after it
MODES = [("killed", True), ("ENOSPC", False), ("ENOSPC", True), ("EIO", False), ("EIO", True)]
MODES += [("short", False), ("short", True), ("rename", False), ("rename", True)]
# nothing in the library looks at which error it is, and that a disk stays as it is, ENOSPC shows too
FEWER = [mode for mode in MODES[:3] + MODES[5:] if mode not in (("short", True), ("rename", True))]
WHAT = "this folder"


@dataclass(frozen=True)
class Scenario:
    """`prepare` fills a folder that is not there yet, with no fault; `work` changes it and promises as it goes;
    `judge` looks at what is there after a crash; `again` works on it once more, which has to succeed."""

    name: str
    prepare: Callable[[Path], None]
    work: Callable[[Path, Promise], None]
    judge: Callable[[Path, list[str]], None]
    again: Callable[[Path], None]
    overlay: bool = False  # of the disk

    def __str__(self) -> str:
        return self.name


@contextmanager
def process(number: int) -> Iterator[None]:
    """Be another process as far as `os.getpid` says, on a machine where flushing takes no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getpid", lambda: number)
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def survives_faults(scenario: Scenario, place: Path, modes: list[tuple[str, bool]] = MODES) -> Counter[str]:
    """Let every operation of the work fail in each mode. Returns how often the work ended in which way."""
    ends: Counter[str] = Counter()
    for kind, forever in modes:
        for at in itertools.count(1):
            assert at < 2000, "it never passed"
            folder = place / f"{kind}-{forever}-{at}"
            end = _one_fault(scenario, folder, Fault(kind, at, forever))
            shutil.rmtree(folder)
            if end == "passed":
                break
            ends[end] += 1
    return ends


def _one_fault(scenario: Scenario, folder: Path, fault: Fault) -> str:
    with process(DEAD):
        scenario.prepare(folder)
        end = "done"
        with Disk(folder, fault, scenario.overlay) as disk:
            try:
                scenario.work(folder, disk.mark)
            except Killed:
                end = "killed"
            except (UserError, Failure) as error:
                says(error, f"{scenario}: {fault}", str(folder))
                end = "refused"
            except OSError as error:
                if not disk.struck or error.errno not in (errno.ENOSPC, errno.EIO):
                    raise AssertionError(f"{scenario}: {fault}: {error!r} is not the disk's") from error
                end = "failed"
            except Exception as error:
                raise AssertionError(f"{scenario}: {fault}: {error!r} is not of a kind that a caller knows") from error
    with _telling(f"{scenario}: {fault}"):
        assert disk.struck or end == "done"
        assert not disk.dead or end == "killed", "a handler swallowed the kill"
        if fault.kind == "short":  # the fewest, and the check takes its time
            assert power.as_recorded(disk) == power.found(folder), "something went past the disk"
        with process(NEXT if disk.dead else DEAD):
            scenario.judge(folder, disk.marks)
            scenario.again(folder)
    return end if disk.struck else "passed"


def survives_power_cuts(scenario: Scenario, place: Path) -> int:
    """Cut the power after every operation, by every policy. Returns how many different ends that had."""
    folder, count = place / "recorded", 0
    with process(DEAD):
        scenario.prepare(folder)
        with Disk(folder, overlay=scenario.overlay) as disk:
            scenario.work(folder, disk.mark)
    assert disk.marks, "nothing was promised"
    assert power.as_recorded(disk) == power.found(folder), "something went past the disk"
    with process(NEXT):
        for cut, tree in power.power_cuts(disk, place / "cuts"):
            with _telling(f"{scenario}: {cut}"):
                scenario.judge(tree, list(cut.promised))
                scenario.again(tree)
            count += 1
    return count


def says(error: Exception, what: str, *names: str) -> None:
    """An error for a person is one line, and names one of `names`."""
    assert any(name in str(error) for name in names), f"{what}: the error does not name {names}: {error}"
    assert "\n" not in str(error), f"{what}: more than one line: {error}"


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """An error of any kind in the block is a broken promise, and says where."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def _recovered(folder: Path) -> None:
    """What the next command does first."""
    with storage.locked(folder, WHAT):
        storage.recover(folder)


def _nothing_else(folder: Path, *names: str) -> None:
    there = {path.name for path in folder.iterdir()}
    assert there <= {*names, ".lock"}, f"left over: {sorted(there - {*names, '.lock'})}"


# One file.

OLD, NEW = b"old", b"new " * 30  # short enough to be held back until a flush


def _a_file(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "a.txt").write_bytes(OLD)


def _write(folder: Path, promise: Promise) -> None:
    storage.write_bytes(folder / "a.txt", NEW)
    promise("written")


def _old_or_new(folder: Path, promised: list[str]) -> None:
    _recovered(folder)
    assert (folder / "a.txt").read_bytes() in ([NEW] if promised else [OLD, NEW])
    _nothing_else(folder, "a.txt")


def _write_once_more(folder: Path) -> None:
    storage.write_bytes(folder / "a.txt", b"newer")
    assert (folder / "a.txt").read_bytes() == b"newer"
    _nothing_else(folder, "a.txt")


# One file in folders that are not there yet.


def _write_below(folder: Path, promise: Promise) -> None:
    storage.write_bytes(folder / "x" / "y" / "a.txt", NEW)
    promise("written")


def _new_or_absent(folder: Path, promised: list[str]) -> None:
    path = folder / "x" / "y" / "a.txt"
    if promised or path.exists():
        assert path.is_file(), "the file is gone"
        assert path.read_bytes() == NEW


def _write_below_once_more(folder: Path) -> None:
    storage.write_bytes(folder / "x" / "y" / "a.txt", b"newer")
    assert (folder / "x" / "y" / "a.txt").read_bytes() == b"newer"


# A record that grows.


def _row(step: int) -> bytes:
    return json.dumps({"step": step, "split": "train", "loss": 4.5}).encode() + b"\n"


def _a_record(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / metrics.NAME).write_bytes(_row(0))


def _append(folder: Path, promise: Promise) -> None:
    for step in (1, 2, 3):
        storage.append(folder / metrics.NAME, _row(step))
        promise(f"appended {step}")
        if step == 2:
            storage.flush(folder / metrics.NAME)
            promise("flushed 2")


def _rows(folder: Path, least: int) -> None:
    """The record is rows 0 to some step, at least `least`, and then perhaps a torn line."""
    _recovered(folder)
    steps = [row["step"] for row in metrics.read_record(folder)]
    assert steps == list(range(len(steps)))
    assert len(steps) > least, f"row {least} is gone"


def _as_appended(folder: Path, promised: list[str]) -> None:
    _rows(folder, max((int(mark.split()[1]) for mark in promised), default=0))


def _as_flushed(folder: Path, promised: list[str]) -> None:
    _rows(folder, max((int(mark.split()[1]) for mark in promised if mark.startswith("flushed")), default=0))


def _append_once_more(folder: Path) -> None:
    metrics.Record(folder).cut(100)
    before = len(metrics.read_record(folder))
    storage.append(folder / metrics.NAME, _row(100))
    steps = [row["step"] for row in metrics.read_record(folder)]
    assert len(steps) == before + 1
    assert steps[-1] == 100


# An append that failed leaves the file as it was, so that the next row does not stand on a torn one.


def _append_and_go_on(folder: Path, promise: Promise) -> None:
    for step in (1, 2, 3):
        before = (folder / metrics.NAME).read_bytes()
        try:
            storage.append(folder / metrics.NAME, _row(step))
        except OSError:
            if (folder / metrics.NAME).read_bytes() == before:
                promise("as it was")
                continue
            try:
                os.truncate(folder / metrics.NAME, len(before))
                promise("changed")
            except OSError:
                promise("beyond repair")  # what it wrote cannot be taken back


def _nothing_torn(folder: Path, promised: list[str]) -> None:
    _recovered(folder)
    assert "changed" not in promised, "the append failed, and the file was not as it was"
    steps = [row["step"] for row in metrics.read_record(folder)]
    assert steps == sorted(set(steps))


# A folder with a manifest.

FIRST, SECOND = {"a": b"first", "b": b"first b"}, {"a": b"second", "c": b"c " * 5000}


def _put(folder: Path, content: dict[str, bytes]) -> None:
    with storage.folder_in_place(folder / "state") as new:
        for name, data in content.items():
            storage.write_bytes(new / name, data)


def _plainly(folder: Path, content: dict[str, bytes]) -> None:
    """As `_put`, for files that the block writes without a flush."""
    with storage.folder_in_place(folder / "state") as new:
        for name, data in content.items():
            (new / name).write_bytes(data)


def _content(folder: Path) -> dict[str, bytes]:
    storage.verify_folder(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def _place(put: Callable[[Path, dict[str, bytes]], None]) -> Callable[[Path, Promise], None]:
    def work(folder: Path, promise: Promise) -> None:
        with storage.locked(folder, WHAT):
            put(folder, SECOND)
            promise("placed")

    return work


def _whole_or_absent(folder: Path, promised: list[str]) -> None:
    _recovered(folder)
    if promised or (folder / "state").exists():
        assert _content(folder / "state") == SECOND
    _nothing_else(folder, "state")


def _first_or_second(folder: Path, promised: list[str]) -> None:
    _recovered(folder)
    assert (folder / "state").exists(), "both are gone"
    assert _content(folder / "state") in ([SECOND] if promised else [FIRST, SECOND])
    _nothing_else(folder, "state")


def _place_once_more(folder: Path) -> None:
    for content in (FIRST, SECOND):
        _put(folder, content)
        assert _content(folder / "state") == content
    _nothing_else(folder, "state")


def _empty(folder: Path) -> None:
    folder.mkdir(parents=True)


def _a_state(folder: Path) -> None:
    _empty(folder)
    _put(folder, FIRST)


def _insist(folder: Path, promise: Promise) -> None:
    """Try three times, as a run does that a failed save does not end."""
    with storage.locked(folder, WHAT):
        for attempt in range(3):
            try:
                _put(folder, SECOND)
                promise("placed")
            except OSError:
                if attempt == 2:
                    raise


# Several files together.

BEFORE, AFTER = {"a": b"old a", "b": b"old b", "c": b"stays"}, {"a": b"new a", "b": b"new b " * 2000, "d": b"added"}


def _files(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, data in BEFORE.items():
        (folder / name).write_bytes(data)


def _replace_together(folder: Path, promise: Promise) -> None:
    with storage.locked(folder, WHAT):
        with storage.transaction(folder) as staging:
            for name, data in AFTER.items():
                storage.write_bytes(staging / name, data)
        promise("replaced")


def _replace_plainly(folder: Path, promise: Promise) -> None:
    """As token files are written: the block flushes nothing."""
    with storage.locked(folder, WHAT):
        with storage.transaction(folder) as staging:
            for name, data in AFTER.items():
                (staging / name).write_bytes(data)
        promise("replaced")


def _all_or_none(folder: Path, promised: list[str]) -> None:
    _recovered(folder)
    assert not storage.unfinished(folder)
    content = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    assert content in ([BEFORE | AFTER] if promised else [BEFORE, BEFORE | AFTER])


def _replace_once_more(folder: Path) -> None:
    last = {"a": b"last a", "c": b"last c"}
    before = {path.name for path in folder.iterdir()}
    with storage.locked(folder, WHAT), storage.transaction(folder) as staging:
        for name, data in last.items():
            storage.write_bytes(staging / name, data)
    assert {name: (folder / name).read_bytes() for name in last} == last
    assert {path.name for path in folder.iterdir()} == before | {".lock"}


# Saved states.


@dataclass(frozen=True)
class Saves:
    """Save the steps one after the other, under the lock, going on after a failure as a run may.

    Attempts are numbered from 1, so that two of the same step can be told apart. A mark "saved 3" says that the
    third attempt returned; from then on nothing older may be what a resume finds.
    """

    steps: tuple[int, ...]
    keep: int
    best: tuple[int, ...] = ()  # attempts that are the best so far
    fresh: bool = False  # the run folder is not there yet

    @property
    def scenario(self) -> Scenario:
        best = f", best {self.best}" if self.best else ""
        name = f"saves {self.steps}, keep {self.keep}{best}{', a new folder' if self.fresh else ''}"
        return Scenario(name, _empty, self.work, self.judge, self.again)

    def run_dir(self, folder: Path) -> Path:
        return folder / "runs" / "mine" if self.fresh else folder

    def save(self, folder: Path, attempt: int, step: int) -> None:
        best = max((one for one in self.best if one <= attempt), default=None)
        best_step = None if best is None else self.steps[best - 1]
        facts = {"attempt": attempt}
        checkpoint.save_state(self.run_dir(folder), step, groups(attempt), facts, self.keep, best_step)

    def work(self, folder: Path, promise: Promise) -> None:
        with storage.locked(self.run_dir(folder), WHAT):
            for attempt, step in enumerate(self.steps, 1):
                with suppress(OSError):
                    self.save(folder, attempt, step)
                    promise(f"saved {attempt}" + (" best" if attempt in self.best else ""))

    def judge(self, folder: Path, promised: list[str]) -> None:
        run = self.run_dir(folder)
        saved = max((int(mark.split()[1]) for mark in promised), default=0)
        best = max((int(mark.split()[1]) for mark in promised if mark.endswith("best")), default=0)
        if not promised and not run.exists():
            return
        _recovered(run)
        for step in checkpoint.saved_steps(run):  # those that were being retired too
            checkpoint.load_state(run / checkpoint.folder_name(step))
        if best:  # or a later one, which was not promised
            steps = {self.steps[attempt - 1] for attempt in self.best if attempt >= best}
            there = [run / checkpoint.folder_name(step) for step in steps.intersection(checkpoint.saved_steps(run))]
            newest = max((_attempt(*checkpoint.load_state(state)) for state in there), default=0)
            assert newest >= best, "the best is gone, or older than promised"
        try:
            found, facts, passed_over = checkpoint.newest_state(run)
        except UserError as error:
            says(error, "no state", str(run))
            if promised:
                raise AssertionError(f"{error}, though attempt {saved} was saved") from error
            return
        assert not passed_over, f"a newer state is there and not whole: {passed_over}"
        attempt = _attempt(found, facts)
        assert attempt >= saved, f"attempt {attempt} was found, though {saved} was saved"
        assert facts["step"] == self.steps[attempt - 1]
        _nothing_else(run, *map(checkpoint.folder_name, checkpoint.saved_steps(run)))

    def again(self, folder: Path) -> None:
        run = self.run_dir(folder)
        steps = checkpoint.saved_steps(run)
        step, attempt = max(steps, default=0) + 1, len(self.steps) + 1
        with storage.locked(run, WHAT):
            self.save(folder, attempt, step)
        found, facts, passed_over = checkpoint.newest_state(run)
        assert not passed_over
        assert _attempt(found, facts) == attempt
        assert facts["step"] == step
        kept = checkpoint.saved_steps(run)
        assert len(kept) <= self.keep + bool(self.best), f"{kept} were kept"
        for other in kept:
            checkpoint.load_state(run / checkpoint.folder_name(other))
        assert len(kept) >= min(self.keep, len(steps) + 1), f"only {kept} were kept"


def groups(attempt: int) -> checkpoint.Groups:
    return {"model": {"w": torch.arange(attempt, attempt + 5, dtype=torch.float32)}}


def _attempt(found: checkpoint.Groups, facts: dict[str, Any]) -> int:
    """Which attempt a loaded state is of, once its tensors are that attempt's to the bit."""
    attempt = facts["attempt"]
    expected = groups(attempt)["model"]
    assert found.keys() == {"model"}
    assert found["model"].keys() == expected.keys()
    assert all(torch.equal(found["model"][name], value) for name, value in expected.items())
    return int(attempt)


# States in the lower layer of an overlay, which renames none of its folders.


def _states_below(folder: Path) -> None:
    _empty(folder)
    two_states(folder)


def _save_over(folder: Path, promise: Promise) -> None:
    with storage.locked(folder, WHAT):
        for attempt, step in ((3, 2), (4, 3)):
            checkpoint.save_state(folder, step, groups(attempt), {"attempt": attempt}, 1)
            promise(str(attempt))


def _one_is_whole(folder: Path, promised: list[str]) -> None:
    """What was promised is there. Before the first promise the state that is saved anew may be gone, not the other."""
    _recovered(folder)
    found, facts, _ = checkpoint.newest_state(folder)
    assert _attempt(found, facts) >= max(map(int, promised), default=1)
    _nothing_else(folder, *map(checkpoint.folder_name, checkpoint.saved_steps(folder)))


def _save_once_more(folder: Path) -> None:
    checkpoint.save_state(folder, 9, groups(5), {"attempt": 5}, 1)
    assert checkpoint.saved_steps(folder) == [9]
    assert _attempt(*checkpoint.load_state(folder / checkpoint.folder_name(9))) == 5


FILE = Scenario("a file over an old one", _a_file, _write, _old_or_new, _write_once_more)
FILE_BELOW = Scenario("a file in new folders", _empty, _write_below, _new_or_absent, _write_below_once_more)
RECORD = Scenario("a record that grows", _a_record, _append, _as_appended, _append_once_more)
RECORD_FLUSHED = Scenario("a record that is flushed", _a_record, _append, _as_flushed, _append_once_more)
RECORD_GOES_ON = Scenario("a record after a failure", _a_record, _append_and_go_on, _nothing_torn, lambda folder: None)
NEW_FOLDER = Scenario("a new folder", _empty, _place(_put), _whole_or_absent, _place_once_more)
NEW_FOLDER_PLAIN = Scenario("a new folder, plainly", _empty, _place(_plainly), _whole_or_absent, _place_once_more)
FOLDER = Scenario("a folder over an old one", _a_state, _place(_put), _first_or_second, _place_once_more)
FOLDER_INSISTED = Scenario("a folder, tried again", _a_state, _insist, _first_or_second, _place_once_more)
SEVERAL = Scenario("several files", _files, _replace_together, _all_or_none, _replace_once_more)
SEVERAL_PLAIN = Scenario("several files, plainly", _files, _replace_plainly, _all_or_none, _replace_once_more)
OVERLAY = Scenario("states of a lower layer", _states_below, _save_over, _one_is_whole, _save_once_more, True)
STORAGE = [FILE, FILE_BELOW, NEW_FOLDER, NEW_FOLDER_PLAIN, FOLDER, SEVERAL, SEVERAL_PLAIN]
SAVES = [
    Saves((1, 2, 3), keep=1).scenario,
    Saves((1, 2, 3), keep=2).scenario,
    Saves((1, 2, 3), keep=1, best=(1, 3)).scenario,
    Saves((1, 2, 3), keep=2, best=(1,)).scenario,
    Saves((1, 2, 2), keep=1, best=(2, 3)).scenario,
    Saves((1, 2), keep=1, fresh=True).scenario,
]


# Damage, a lock, a state under another name: what no fault of the disk is needed for.


def two_states(run: Path) -> Path:
    """Two attempts, saved; returns the folder of the newer one."""
    for attempt in (1, 2):
        checkpoint.save_state(run, attempt, groups(attempt), {"attempt": attempt}, 2)
    return run / checkpoint.folder_name(2)


def falls_back(run: Path, what: str, *names: str) -> None:
    """The newer of two states is damaged: loading it is refused by its name (or one of
    `names`), and a resume finds the older one."""
    newer = run / checkpoint.folder_name(2)
    try:
        facts = checkpoint.load_state(newer)[1]
    except UserError as error:
        says(error, what, str(newer), *names)
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}, not a UserError: {error}") from error
    else:
        raise AssertionError(f"{what}: it was loaded, as {facts}")
    try:
        found, facts, passed_over = checkpoint.newest_state(run)
    except UserError as error:
        raise AssertionError(f"{what}: the older state was not found: {error}") from error
    assert _attempt(found, facts) == 1
    assert len(passed_over) == 1


def notices_flips(place: Path) -> None:
    """Any bit of a state's tensors is vouched for."""
    path = two_states(place) / "model.safetensors"
    content = path.read_bytes()
    for at in range(len(content) - 20, len(content)):
        flip(path, content, at, 1)
        falls_back(place, f"{path.name}, byte {at}")


def flip(path: Path, content: bytes, at: int, bits: int) -> None:
    path.write_bytes(content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :])


def refuses_links(place: Path) -> None:
    """A state holds its own bytes: a link to equal ones elsewhere may change under it."""
    newer = two_states(place / "run")
    for name in sorted(os.listdir(newer)):
        (newer / name).rename(place / name)
        (newer / name).symlink_to(place / name)
        falls_back(place / "run", f"{name}, a link")
        (newer / name).unlink()
        (place / name).rename(newer / name)


def refuses_another_name(place: Path) -> None:
    """A state is of the step that its folder is named after."""
    two_states(place).rename(place / checkpoint.folder_name(3))
    shutil.copytree(place / checkpoint.folder_name(1), place / checkpoint.folder_name(2))
    (place / checkpoint.folder_name(3)).rename(place.parent / "elsewhere")
    falls_back(place, "step 1 under the name of step 2")


def one_holder(place: Path) -> None:
    with storage.locked(place, WHAT):
        try:
            with storage.locked(place, WHAT):
                pass
        except UserError as error:
            says(error, "a second holder", str(place))
        else:
            raise AssertionError("two hold the lock")
    with storage.locked(place, WHAT):
        pass
