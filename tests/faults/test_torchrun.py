"""Jobs of torchrun in which a rank or the launcher is killed, stopped or terminated.

LOSSCURVE_TORTURE=1 (make torture) runs more cases of each.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from conftest import flags
from ranks import exit_codes

import llm
from llm.checks.prove import fingerprint
from llm.checks.verify import verify
from llm.storage import checkpoint

TORTURE = bool(os.environ.get("LOSSCURVE_TORTURE"))
STEPS = 240 if TORTURE else 60
LONG = {"text": "text.txt", "max_steps": STEPS, "eval_every": STEPS // 2, "save_every": 10, "dropout": 0.1, "keep": 99}
HEARTBEAT_TIMEOUT = 5  # seconds, which a busy machine may let pass between two heartbeats; the default is 60
ENV = {"LOSSCURVE_SILENCE": str(HEARTBEAT_TIMEOUT), "OMP_NUM_THREADS": "1"}


class Torchrun:
    """A job of torchrun in the current folder; a mark in their environment identifies its processes."""

    def __init__(self, size: int, line: str, *options: str) -> None:
        self.mark = f"LOSSCURVE_MARK={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        env = os.environ | ENV | {name: value, "PYTHONPATH": str(Path(llm.__file__).parent.parent)}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}", *options]
        with open("err.txt", "wb") as err, open("out.txt", "wb") as out:
            command += ["-m", "llm", "train", *line.split()]
            self.launcher = subprocess.Popen(command, stdout=out, stderr=err, env=env)
        self.fault_time = time.monotonic()

    def members(self) -> dict[int, int]:
        """Return the living processes as {rank: pid}; the launcher is rank -1. Children of the ranks are not listed."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment = (path / "environ").read_bytes().decode(errors="replace").split("\0")
                ended = (path / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
            except OSError:
                continue
            if self.mark in environment and not ended:
                variables = {name: value for name, _, value in (one.partition("=") for one in environment)}
                found.setdefault(int(variables.get("RANK", -1)), int(path.name))
        return found

    def wait_for_step(self, step: int, out_dir: str = "checkpoints") -> dict[int, int]:
        """Wait for a checkpoint of at least that step; return the processes that are alive then, as {rank: pid}."""
        deadline = time.monotonic() + 60
        while not any(saved >= step for saved in checkpoint.saved_steps(Path(out_dir))):
            assert self.launcher.poll() is None, self.err
            assert time.monotonic() < deadline, self.err
            time.sleep(0.01)
        return self.members()

    def send_signal(self, pid: int, number: int) -> None:
        os.kill(pid, number)
        self.fault_time = time.monotonic()

    def wait_until_ended(self, timeout: float = 60) -> tuple[int, float]:
        """Return (exit code, seconds from the fault to the end of the last process)."""
        code = self.launcher.wait(timeout)
        deadline = time.monotonic() + timeout
        while alive := self.members():
            assert time.monotonic() < deadline, f"still alive: {alive}\n{self.err}"
            time.sleep(0.05)
        return code, time.monotonic() - self.fault_time

    def close(self) -> None:
        for pid in self.members().values():
            os.kill(pid, signal.SIGKILL)
        self.launcher.wait(30)

    @property
    def err(self) -> str:
        return Path("err.txt").read_text(encoding="utf-8", errors="replace")

    @property
    def errors(self) -> list[str]:
        """Our error lines on stderr, to which torchrun adds its own."""
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
    """Return a function that trains without faults and returns the run's fingerprint, by kind and number of ranks."""
    place = tmp_path_factory.mktemp("undisturbed")
    found = {}

    def run(here, kind="ddp", size=2):
        if (kind, size) not in found:
            line = f"train {flags(**LONG, parallel=kind)} --out_dir {place / kind}-{size} --data_dir {place / 'data'}"
            assert exit_codes(size, line, place / f"{kind}-{size}-outcomes") == [0] * size
            found[kind, size] = fingerprint(place / f"{kind}-{size}")
        return found[kind, size]

    return run


def check_files(folder="checkpoints"):
    assert [found for found in verify(Path(folder)) if found.good is False] == []


def check_resume(here, kind, size, expected):
    """Resume the run with as many processes; it must end as the undisturbed run did."""
    line = "train --resume --out_dir checkpoints"
    assert exit_codes(size, line, here / f"outcomes-{uuid.uuid4().hex}") == [0] * size
    assert fingerprint(Path("checkpoints")) == expected
    check_files()


@pytest.mark.skipif(not TORTURE, reason="a job that torchrun starts again has the same kill in it: in make torture")
def test_a_killed_rank_ends_the_others_and_is_named(here, torchrun, undisturbed, record_property):
    expected = undisturbed(here)
    for rank in (0, 1) if TORTURE else (1,):
        shutil.rmtree("checkpoints", ignore_errors=True)
        run = torchrun(2, flags(**LONG))
        run.send_signal(run.wait_for_step(30)[rank], signal.SIGKILL)
        code, seconds = run.wait_until_ended()
        assert code != 0
        assert len(run.errors) == 1, run.err
        assert f"lost contact: no heartbeat from rank {rank} (" in run.errors[0]
        assert seconds < 40
        record_property("ranks killed under torchrun", 1)
        print(f"rank {rank} killed: {seconds:.1f} s to the end; {run.errors[0]}")
        check_files()
    check_resume(here, "ddp", 2, expected)


def test_a_killed_launcher_leaves_no_orphan(here, torchrun, undisturbed, record_property):
    expected = undisturbed(here)
    run = torchrun(2, flags(**LONG | {"max_steps": 10**6}))
    run.send_signal(run.wait_for_step(30)[-1], signal.SIGKILL)
    code, seconds = run.wait_until_ended(20)
    assert code == -signal.SIGKILL
    assert len(run.errors) == 1, run.err
    assert "the launcher of this process is gone" in run.errors[0]
    assert seconds < 30
    print(f"launcher killed: {seconds:.1f} s to the end; {run.errors[0]}")
    record_property("launchers killed", 1)
    check_files()
    states = checkpoint.saved_steps(Path("checkpoints"))
    assert states[-1] >= 30
    assert expected  # max_steps differs, so only check that the run can be resumed
    line = f"train --resume --max_steps {states[-1] + 5}"
    assert exit_codes(1, line, here / "outcomes") == [0]


def test_a_job_that_torchrun_restarts_resumes_and_is_saved_on_sigterm(here, torchrun, undisturbed, record_property):
    expected = undisturbed(here)
    run = torchrun(2, flags(**LONG), "--max-restarts=2")
    for killed, step in ((1, 20), (0, 150)) if TORTURE else ((1, 20),):
        first = run.wait_for_step(step)
        run.send_signal(first[killed], signal.SIGKILL)
        while run.members().get(0, first[0]) == first[0]:
            assert run.launcher.poll() is None, run.err
            time.sleep(0.05)
    run.send_signal(run.wait_for_step(160 if TORTURE else 40)[-1], signal.SIGTERM)
    code, seconds = run.wait_until_ended()
    assert code != 0
    saved = int(Path("out.txt").read_text().split("saved step ")[1].split()[0])
    assert checkpoint.newest_state(Path("checkpoints"))[1]["step"] == saved
    assert run.err.count("finishing this step, then saving") == 1
    assert len(run.errors) == 1 + TORTURE, run.err
    assert "lost contact: no heartbeat from rank 1 (" in run.errors[0]
    print(f"killed, started again, terminated: {seconds:.1f} s to the end, saved step {saved}")
    record_property("restarts by torchrun", 1 + TORTURE)
    record_property("launchers terminated", 1)
    check_resume(here, "ddp", 2, expected)


@pytest.mark.skipif(not TORTURE, reason="the test above ends before its run is complete: in make torture")
def test_a_job_that_torchrun_restarts_ends_its_run(here, torchrun, undisturbed, record_property):
    expected = undisturbed(here, "fsdp")
    run = torchrun(2, flags(**LONG, parallel="fsdp"), "--max-restarts=2")
    run.send_signal(run.wait_for_step(30)[1], signal.SIGKILL)
    code, seconds = run.wait_until_ended(90)
    assert code == 0, run.err
    assert "lost contact: no heartbeat from rank 1 (" in run.errors[0]
    assert fingerprint(Path("checkpoints")) == expected
    check_files()
    print(f"killed and started again: {seconds:.1f} s to the end of the run")
    record_property("restarts by torchrun", 1)


@pytest.mark.skipif(not TORTURE, reason="tests/test_distributed_errors.py starts its processes again without torchrun")
def test_a_restarted_job_never_touches_a_run_that_it_did_not_start(here, torchrun):
    line = f"train {flags(text='text.txt', max_steps=3)} --data_dir data --out_dir held"
    assert exit_codes(1, line, here / "outcomes") == [0]
    before = {path: path.read_bytes() for path in Path("held").rglob("*") if path.is_file()}
    run = torchrun(2, f"{flags(**LONG)} --data_dir data --out_dir held", "--max-restarts=2")
    code, _ = run.wait_until_ended()
    assert code != 0
    assert len(run.errors) == 3, run.err  # one per start
    assert all("held: holds a run saved at step 3" in line for line in run.errors)
    assert {path: path.read_bytes() for path in Path("held").rglob("*") if path.is_file()} == before


@pytest.mark.skipif(not TORTURE, reason="torchrun waits 30 s for a process that is stopped: in make torture")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_ends_the_job_of_torchrun(here, torchrun, undisturbed, rank, record_property):
    expected = undisturbed(here)
    run = torchrun(2, flags(**LONG))
    run.send_signal(run.wait_for_step(30)[rank], signal.SIGSTOP)
    code, seconds = run.wait_until_ended(90)
    assert code != 0
    assert len(run.errors) == 1, run.err
    assert f"no heartbeat from rank {rank} (" in run.errors[0]
    print(f"rank {rank} stopped: {seconds:.1f} s to the end; {run.errors[0]}")
    record_property("ranks stopped under torchrun", 1)
    check_resume(here, "ddp", 2, expected)


@pytest.mark.skipif(not TORTURE, reason="in make torture")
def test_a_job_whose_processes_were_all_stopped_continues(here, torchrun, undisturbed):
    """Ctrl-Z in a terminal does this. They are stopped for longer than the heartbeat timeout."""
    expected = undisturbed(here)
    run = torchrun(2, flags(**LONG))
    pids = list(run.wait_for_step(30).values())
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(2 * HEARTBEAT_TIMEOUT if number == signal.SIGSTOP else 0)
    assert run.wait_until_ended(60)[0] == 0, run.err
    assert fingerprint(Path("checkpoints")) == expected
