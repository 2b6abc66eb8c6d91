"""A fork that is killed, or that a disk refuses, is a whole run folder or none at all."""

import itertools
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import config_for, trained

from llm.errors import UserError
from llm.record.runs import find
from llm.start.fork import fork
from llm.storage import sha256
from tests.faults import checks
from tests.faults.disk import Disk, Fault, Killed

TORTURE = bool(os.environ.get("LOSSCURVE_TORTURE"))
STRIDE = 1 if TORTURE else 23  # of the operations that fail
DONE = Path("forks/new")


@pytest.fixture
def base(here):
    config = config_for(here, out_dir="base", max_steps=4, save_every=2, eval_every=2, sample_tokens=3)
    return trained(config)[0].out_dir


def make_fork(base: Path) -> None:
    fork(base, 2, {"max_lr": 0.02}, DONE)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["killed", "ENOSPC"])
def test_a_fork_is_complete_or_absent(base, kind, record_property):
    make_fork(base)
    whole = content(DONE)
    assert {"config.toml", "env.json", "metrics.jsonl", "model.pt", "step-000002/manifest.json"} <= whole.keys()
    hits = 0
    for at in itertools.count(1, STRIDE):
        shutil.rmtree("forks")
        Path("forks").mkdir()
        fault = Fault(kind, at, forever=True)
        with checks.process(checks.DEAD), Disk(Path("forks"), fault) as disk, suppress(Killed, OSError, UserError):
            make_fork(base)
        if not disk.struck:
            break
        hits += 1
        assert content(DONE) == whole if DONE.exists() else find(Path("forks"))[0] == []
        if not DONE.exists():
            make_fork(base)
        assert content(DONE) == whole
        left = [path.name for path in Path("forks").iterdir() if path.name != f".x.probe-{checks.DEAD}"]
        assert left == ["new"]  # and at most the empty file that asked whether the folder can be written to
    record_property("operations of a fork that failed", hits)
    assert hits * STRIDE > 60
