"""Worlds in which a rank hangs, never starts, or is killed at an exchange of a save.

LOSSCURVE_TORTURE=1 (make torture) runs more cases of each.
"""

import itertools
import os
import shutil
import time
from functools import partial
from pathlib import Path

import pytest
import rank_jobs
import torch
from conftest import flags
from rank_jobs import Kill
from ranks import error_lines, exit_codes, job, require_values, run_job

from llm.checks.prove import fingerprint
from llm.checks.verify import verify
from llm.storage import checkpoint

TORTURE = bool(os.environ.get("LOSSCURVE_TORTURE"))
HEARTBEAT_TIMEOUT = 3  # seconds; the default is 60
ENV = {"LOSSCURVE_SILENCE": str(HEARTBEAT_TIMEOUT), "OMP_NUM_THREADS": "1"}


def check_files():
    assert [found for found in verify(Path("checkpoints")) if found.good is False] == []


@pytest.mark.parametrize("rank", [0, 1] if TORTURE else [1])
def test_a_rank_that_hangs_ends_the_others_and_is_named(here, rank):
    """A rank stopped by SIGSTOP neither exits nor sends heartbeats."""
    start = time.monotonic()
    line = f"train {flags(text='text.txt', max_steps=40, save_every=5, batch_size=6)}"
    stopping = job(rank_jobs.run_command, lines=[line], change=Kill(rank, 10))
    errors = error_lines(run_job(3, stopping, here / "outcomes", ENV, stopped=(rank,)))
    assert len(errors) == 1, errors
    assert f"no heartbeat from rank {rank} (" in errors[0]
    assert f"for {HEARTBEAT_TIMEOUT} s: it hangs, was stopped, or was cut off; continue with --resume" in errors[0]
    assert time.monotonic() - start < HEARTBEAT_TIMEOUT + 45  # mostly the start of three processes on a busy machine
    check_files()
    assert checkpoint.saved_steps(Path("checkpoints"))[-1] in (5, 8)  # 8: a new best, if it was written by then


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_starts_is_named(here, rank):
    """On another machine it may have exited before it could report that to this one."""
    change = partial(rank_jobs.exit_before_start, absent=rank)
    starting = job(rank_jobs.run_command, lines=[f"train {flags(text='text.txt')}"], change=change)
    outcomes = run_job(2, starting, here / "outcomes")
    assert outcomes[1 - rank].value == 1
    assert error_lines([outcomes[1 - rank]]) == [
        f"error: rank {rank} did not start within 0:00:01 (h:mm:ss); "
        "read the error on its machine, then start the run again"
    ]
    assert not Path("checkpoints").exists()


# A rank is killed at each exchange of a save.

SHORT = {"text": "text.txt", "data_dir": "data", "max_steps": 12, "save_every": 5, "eval_every": 12, "n_layer": 1}


def errors_after(here, kind, size, kill, number):
    """Train with a rank that is killed; return the error lines of the others. None if there are fewer exchanges."""
    shutil.rmtree("checkpoints", ignore_errors=True)
    line = f"train {flags(**SHORT, parallel=kind)}"
    killing = job(rank_jobs.run_command, lines=[line], change=kill)
    outcomes = run_job(size, killing, here / f"outcomes {number}", ENV)
    assert number < 400
    if outcomes[kill.rank].value is not None:
        assert require_values(outcomes) == [0] * size
        return None
    survivors = [one for rank, one in enumerate(outcomes) if rank != kill.rank]
    # Exit code 1, or None: the watchdog ended a rank that waited for another which waited for the killed one.
    codes = [one.value for one in survivors]
    assert set(codes) <= {1, None}, outcomes
    assert 1 in codes, outcomes
    return error_lines(survivors)


CASES = [(kind, rank, after) for kind in ("ddp", "fsdp") for rank in (0, 1) for after in (False, True)]


@pytest.mark.parametrize(("kind", "rank", "after"), CASES if TORTURE else [("ddp", 0, False), ("fsdp", 1, True)])
def test_a_rank_killed_at_any_exchange_of_a_save(here, kind, rank, after, record_property):
    """Killed before or after an exchange, a rank leaves files that verify and can be resumed."""
    line = f"train {flags(**SHORT, parallel=kind)} --out_dir whole"
    assert exit_codes(2, line, here / "outcomes of whole") == [0, 0]
    weights = torch.load("whole/model.pt", weights_only=True)
    expected = fingerprint(Path("whole"))
    for at in itertools.count(1) if TORTURE else [{"ddp": 2, "fsdp": 23}[kind]]:
        errors = errors_after(here, kind, 2, Kill(rank, 10, at, after), at)
        if errors is None and TORTURE:
            break
        assert len(errors) == 1, (at, errors)
        assert f"no heartbeat from rank {rank} (" in errors[0], (at, errors)
        check_files()
        states = checkpoint.saved_steps(Path("checkpoints"))
        assert states, at
        assert states[-1] in (0, 5, 10), at  # no rank waits for the save of step 5 until that of step 10 begins
        assert exit_codes(2, "train --resume", here / f"outcomes of resume {at}") == [0, 0]
        assert fingerprint(Path("checkpoints")) == expected, at
        record_property("ranks killed at an exchange", 1)
    assert not TORTURE or at > (1 if kind == "ddp" else 40)
    assert weights.keys() == torch.load("checkpoints/model.pt", weights_only=True).keys()


@pytest.mark.skipif(not TORTURE, reason="two ranks are enough: in make torture")
@pytest.mark.parametrize("rank", [0, 2])
def test_one_of_four_ranks_reports_the_cause(here, rank):
    errors = errors_after(here, "fsdp", 4, Kill(rank, 5, 3), 0)
    assert len(errors) == 1, errors
    assert f"no heartbeat from rank {rank} (" in errors[0]
    check_files()
