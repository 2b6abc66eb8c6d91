"""Processes of a run that end, hang or lose their launcher: torchrun's own jobs, and worlds killed at each exchange.

LOSSCURVE_TORTURE=1 (make torture) does more of each.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from functools import partial
from pathlib import Path

import pytest
import ranks
import torch
from conftest import flags
from ranks import Kill, job, values, world_of

import llm
from llm.checks.prove import fingerprint
from llm.checks.verify import verify
from llm.storage import checkpoint

TORTURE = bool(os.environ.get("LOSSCURVE_TORTURE"))
STEPS = 240 if TORTURE else 100
LONG = {"text": "text.txt", "max_steps": STEPS, "eval_every": STEPS // 2, "save_every": 10, "dropout": 0.1, "keep": 99}
SILENCE = 3  # seconds without a sign of life after which a job ends, 60 if nobody asks for less
ENV = {"LOSSCURVE_SILENCE": str(SILENCE), "OMP_NUM_THREADS": "1"}


class Torchrun:
    """A job of torchrun in the current folder, whose processes are known by a mark in their environment."""

    def __init__(self, size: int, line: str, *options: str) -> None:
        self.mark = f"LOSSCURVE_MARK={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        env = os.environ | ENV | {name: value, "PYTHONPATH": str(Path(llm.__file__).parent.parent)}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}", *options]
        with open("err.txt", "wb") as err, open("out.txt", "wb") as out:
            command += ["-m", "llm", "train", *line.split()]
            self.launcher = subprocess.Popen(command, stdout=out, stderr=err, env=env)
        self.fault = time.monotonic()

    def members(self) -> dict[int, int]:
        """The processes that are there, by rank; the launcher is -1, what the ranks started is not listed."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                told = (path / "environ").read_bytes().decode(errors="replace").split("\0")
                ended = (path / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
            except OSError:
                continue
            if self.mark in told and not ended:
                ours = {name: value for name, _, value in (one.partition("=") for one in told)}
                found.setdefault(int(ours.get("RANK", -1)), int(path.name))
        return found

    def at_step(self, step: int, out_dir: str = "checkpoints") -> dict[int, int]:
        """Wait for a state of at least that step; the processes that are at work then."""
        until = time.monotonic() + 60
        while not any(saved >= step for saved in checkpoint.saved_steps(Path(out_dir))):
            assert self.launcher.poll() is None, self.err
            assert time.monotonic() < until, self.err
            time.sleep(0.01)
        return self.members()

    def strike(self, pid: int, number: int) -> None:
        os.kill(pid, number)
        self.fault = time.monotonic()

    def ended(self, patience: float = 60) -> tuple[int, float]:
        """(exit code, seconds from the fault to the end of the last process)."""
        code = self.launcher.wait(patience)
        until = time.monotonic() + patience
        while left := self.members():
            assert time.monotonic() < until, f"left over: {left}\n{self.err}"
            time.sleep(0.05)
        return code, time.monotonic() - self.fault

    def close(self) -> None:
        for pid in self.members().values():
            os.kill(pid, signal.SIGKILL)
        self.launcher.wait(30)

    @property
    def err(self) -> str:
        return Path("err.txt").read_text(encoding="utf-8", errors="replace")

    @property
    def errors(self) -> list[str]:
        """Our lines; torchrun adds its own."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@pytest.fixture
def torchrun(here):
    started = []

    def start(size, line, *options):
        started.append(Torchrun(size, line, *options))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The fingerprint of the run that these tests disturb, by kind and number of processes."""
    place, found = tmp_path_factory.mktemp("undisturbed"), {}

    def run(here, kind="ddp", size=2):
        if (kind, size) not in found:
            line = f"train {flags(**LONG, parallel=kind)} --out_dir {place / kind}-{size} --data_dir {place / 'data'}"
            assert values(world_of(size, [job(ranks.command, lines=[line])], place / f"{kind}-{size}-told")[0])[0] == 0
            found[kind, size] = fingerprint(place / f"{kind}-{size}")
        return found[kind, size]

    return run


def good(folder="checkpoints"):
    assert [found for found in verify(Path(folder)) if found.good is False] == []


def goes_on(here, kind, size, expected):
    """Resumed by as many processes, it ends as the undisturbed run."""
    line = "train --resume --out_dir checkpoints"
    told = world_of(size, [job(ranks.command, lines=[line])], here / f"told-{uuid.uuid4().hex}")[0]
    assert values(told) == [0] * size
    assert fingerprint(Path("checkpoints")) == expected
    good()


def test_a_killed_process_ends_the_others_with_its_name(here, torchrun, undisturbed, record_property):
    expected = undisturbed(here)
    for rank in (0, 1) if TORTURE else (1,):
        shutil.rmtree("checkpoints", ignore_errors=True)
        run = torchrun(2, flags(**LONG))
        run.strike(run.at_step(30)[rank], signal.SIGKILL)
        code, seconds = run.ended()
        assert code != 0
        assert len(run.errors) == 1, run.err
        assert f"lost each other: nothing was heard of rank {rank} (" in run.errors[0]
        assert seconds < 40
        record_property("ranks killed under torchrun", 1)
        print(f"rank {rank} killed: {seconds:.1f} s to the end; {run.errors[0]}")
        good()
    goes_on(here, "ddp", 2, expected)


def test_a_killed_launcher_leaves_no_orphan(here, torchrun, undisturbed, record_property):
    expected = undisturbed(here)
    run = torchrun(2, flags(**LONG | {"max_steps": 10**6}))
    run.strike(run.at_step(30)[-1], signal.SIGKILL)
    code, seconds = run.ended(20)
    assert code == -signal.SIGKILL
    assert len(run.errors) == 1, run.err
    assert "the launcher of this process is gone" in run.errors[0]
    assert seconds < 30
    print(f"launcher killed: {seconds:.1f} s to the end; {run.errors[0]}")
    record_property("launchers killed", 1)
    good()
    states = checkpoint.saved_steps(Path("checkpoints"))
    assert states[-1] >= 30
    assert expected  # the run is another in its max_steps: that it can be resumed is shown by a step more
    line = f"train --resume --max_steps {states[-1] + 5}"
    assert values(world_of(1, [job(ranks.command, lines=[line])], here / "told")[0]) == [0]


def test_a_terminated_launcher_saves_where_it_stopped(here, torchrun, undisturbed, record_property):
    expected = undisturbed(here)
    run = torchrun(2, flags(**LONG))
    run.strike(run.at_step(30)[-1], signal.SIGTERM)
    code, seconds = run.ended()
    assert code != 0
    out = Path("out.txt").read_text()
    saved = int(out.split("saved step ")[1].split()[0])
    assert checkpoint.newest_state(Path("checkpoints"))[1]["step"] == saved
    assert run.err.count("finishing this step, then saving") == 1
    assert not run.errors, run.err
    print(f"launcher terminated: {seconds:.1f} s to the end, saved step {saved}")
    record_property("launchers terminated", 1)
    goes_on(here, "ddp", 2, expected)


def test_started_again_by_torchrun_it_goes_on_by_itself(here, torchrun, undisturbed, record_property):
    expected = undisturbed(here, "fsdp")
    run = torchrun(2, flags(**LONG, parallel="fsdp"), "--max-restarts=2")
    run.strike(run.at_step(30)[1], signal.SIGKILL)
    if TORTURE:
        first = run.members().get(0)
        while run.members().get(0, first) == first:
            time.sleep(0.05)
        run.strike(run.at_step(150)[0], signal.SIGKILL)
    code, seconds = run.ended(90)
    assert code == 0, run.err
    assert fingerprint(Path("checkpoints")) == expected
    good()
    print(f"killed and started again: {seconds:.1f} s to the end of the run")
    record_property("restarts by torchrun", 1 + TORTURE)


def test_started_again_it_never_touches_a_run_that_it_did_not_begin(here, torchrun):
    line = f"train {flags(text='text.txt', max_steps=3)} --data_dir data --out_dir held"
    assert values(world_of(1, [job(ranks.command, lines=[line])], here / "told")[0]) == [0]
    before = {path: path.read_bytes() for path in Path("held").rglob("*") if path.is_file()}
    run = torchrun(2, f"{flags(**LONG)} --data_dir data --out_dir held", f"--max-restarts={2 if TORTURE else 1}")
    code, _ = run.ended()
    assert code != 0
    assert len(run.errors) == (3 if TORTURE else 2), run.err  # one for each start
    assert all("held: holds a run saved at step 3" in line for line in run.errors)
    assert {path: path.read_bytes() for path in Path("held").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_hangs_ends_the_others_with_its_name(here, rank):
    """Stopped by SIGSTOP: it neither ends nor answers."""
    line, start = f"train {flags(text='text.txt', max_steps=40, save_every=5)}", time.monotonic()
    told = world_of(3, [job(ranks.command, lines=[line.replace("--batch_size 4", "--batch_size 6")],
                            change=Kill(rank, 10))], here / "told", ENV, (rank,))[0]  # fmt: skip
    said = [line for one in told for line in one.err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, said
    assert f"nothing was heard of rank {rank} (" in said[0]
    assert f"for {SILENCE} s: it hangs, was stopped, or was cut off; go on with --resume" in said[0]
    assert time.monotonic() - start < SILENCE + 45  # starting three processes on a busy machine is most of it
    good()
    assert checkpoint.saved_steps(Path("checkpoints"))[-1] in (5, 8)  # 8: a new best, if it was written by then


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_comes_is_named(here, rank):
    """On another machine it may have ended before it could say so here."""
    line, change = f"train {flags(text='text.txt')}", partial(ranks.never_comes, absent=rank)
    told = world_of(2, [job(ranks.command, lines=[line], change=change)], here / "told")[0]
    assert told[1 - rank].value == 1
    said = [line for line in told[1 - rank].err.splitlines() if line.startswith("error: ")]
    assert said == [f"error: rank {rank} did not start within 0:00:01 h; see what its machine says, and start again"]
    assert not Path("checkpoints").exists()


@pytest.mark.skipif(not TORTURE, reason="torchrun waits 30 s for a process that is stopped: in make torture")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_hangs_ends_torchruns_job(here, torchrun, undisturbed, rank, record_property):
    expected = undisturbed(here)
    run = torchrun(2, flags(**LONG))
    run.strike(run.at_step(30)[rank], signal.SIGSTOP)
    code, seconds = run.ended(90)
    assert code != 0
    assert len(run.errors) == 1, run.err
    assert f"nothing was heard of rank {rank} (" in run.errors[0]
    print(f"rank {rank} stopped: {seconds:.1f} s to the end; {run.errors[0]}")
    record_property("ranks stopped under torchrun", 1)
    goes_on(here, "ddp", 2, expected)


@pytest.mark.skipif(not TORTURE, reason="in make torture")
def test_a_job_that_was_stopped_whole_goes_on(here, torchrun, undisturbed):
    """As by Ctrl-Z in a terminal, for longer than the silence after which a process is given up."""
    expected = undisturbed(here)
    run = torchrun(2, flags(**LONG))
    pids = list(run.at_step(30).values())
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(2 * SILENCE if number == signal.SIGSTOP else 0)
    assert run.ended(60)[0] == 0, run.err
    assert fingerprint(Path("checkpoints")) == expected


# Killed at each exchange of a save.

SHORT = {"text": "text.txt", "data_dir": "data", "max_steps": 12, "save_every": 5, "eval_every": 12, "n_layer": 1}


def killed_at(here, kind, size, kill, number):
    """A run of which a rank is killed; what the others say of it. None where there are not so many exchanges."""
    shutil.rmtree("checkpoints", ignore_errors=True)
    line = f"train {flags(**SHORT, parallel=kind)}"
    told = world_of(size, [job(ranks.command, lines=[line], change=kill)], here / f"told {number}", ENV)[0]
    assert number < 400
    if told[kill.rank].value is not None:
        assert values(told) == [0] * size
        return None
    said = [line for rank, one in enumerate(told) if rank != kill.rank for line in one.err.splitlines()]
    said = [line for line in said if line.startswith("error: ")]
    # 1, or ended beside an exchange that waits for one that waits for the one that is gone
    left = [one.value for rank, one in enumerate(told) if rank != kill.rank]
    assert set(left) <= {1, None}, told
    assert 1 in left, told
    return said


CASES = [(kind, rank, after) for kind in ("ddp", "fsdp") for rank in (0, 1) for after in (False, True)]


@pytest.mark.parametrize(("kind", "rank", "after"), CASES if TORTURE else [("ddp", 0, False), ("fsdp", 1, True)])
def test_killed_at_any_exchange_of_a_save(here, kind, rank, after, record_property):
    """Before it, in the middle of it as the others see it, or after it: what is there verifies and is gone on with."""
    line = f"train {flags(**SHORT, parallel=kind)} --out_dir whole"
    assert values(world_of(2, [job(ranks.command, lines=[line])], here / "told whole")[0]) == [0, 0]
    weights = torch.load("whole/model.pt", weights_only=True)
    expected, at, step = fingerprint(Path("whole")), 0, 1 if TORTURE else 4 if kind == "ddp" else 30
    while True:
        at += step if at else 1
        said = killed_at(here, kind, 2, Kill(rank, 10, at, after), at)
        if said is None:
            break
        assert len(said) == 1, (at, said)
        assert f"nothing was heard of rank {rank} (" in said[0], (at, said)
        good()
        states = checkpoint.saved_steps(Path("checkpoints"))
        assert states, at
        assert states[-1] in (0, 5, 10), at  # of step 5's nobody waited to hear, unless the save of 10 had begun
        told = world_of(2, [job(ranks.command, lines=["train --resume"])], here / f"told again {at}")[0]
        assert values(told) == [0, 0]
        assert fingerprint(Path("checkpoints")) == expected, at
        record_property("ranks killed at an exchange", 1)
    assert at > (1 if kind == "ddp" else 40)
    assert weights.keys() == torch.load("checkpoints/model.pt", weights_only=True).keys()


@pytest.mark.parametrize("rank", [0, 2])
def test_of_four_processes_one_says_what_happened(here, rank):
    said = killed_at(here, "fsdp", 4, Kill(rank, 5, 3), 0)
    assert len(said) == 1, said
    assert f"nothing was heard of rank {rank} (" in said[0]
    good()
