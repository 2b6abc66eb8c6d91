"""Runs of several processes that are refused or fail: one line names the cause, and every process exits."""

import logging
import os
import re
import shutil
import subprocess
import sys

import pytest
import rank_jobs
import torch.distributed.run
from conftest import SMALL, environment, flags, with_small, words
from ranks import job, require_values, run_job, run_world
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from llm.commands import launch, train
from llm.errors import UserError
from llm.machine.rendezvous import read_torchrun_environment
from llm.prepare.prepare import prepare


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with token files."""
    place = tmp_path_factory.mktemp("ranks")
    (place / "text.txt").write_text(words(900), encoding="utf-8")
    prepare((str(place / "text.txt"),), place / "data", "char")
    return place


REFUSED = {  # what is wrong: (command line by rank, patch of one rank, pattern of the error)
    "other tokens": (["", "--data_dir other/data"], None, r"train\.bin is \w+ on rank 0 .* and \w+ on rank 1"),
    "other settings": (["", "--max_lr 0.5"], None, r"max_lr is 0\.01 on rank 0 .* and 0\.5 on rank 1"),
    "another version": ([""], rank_jobs.patch_version, r"losscurve is [\d.]+\S* on rank 0 .* and 0\.0\.9 on rank 1"),
    "other code": ([""], rank_jobs.patch_code_hash, r"the code of losscurve is \w+ on rank 0 .* and f{64} on rank 1"),
    "no tokens": (["", "--data_dir nowhere"], None, r"rank 1 on \S+: nowhere/train\.bin: no such file"),
    "a torn file": (["", "--data_dir torn"], None, r"rank 1 on \S+: torn/train\.bin: .* not a whole number"),
    "windows": (["--batch_size 3"], None, r"= 3 windows do not divide among 2 processes"),
    "offload": (["--cpu_offload"], None, r"cpu_offload: works with --parallel fsdp only"),
    "compile": (["--parallel fsdp --compile"], None, r"compile: does not work with --parallel fsdp"),
    "float16": (["--parallel fsdp --dtype float16"], None, r"float16'.* does not work with --parallel fsdp"),
    "a device": (["", "--device cuda:99"], None, r"rank 1 on \S+: device = 'cuda:99'"),
    "no run": (["--resume"], None, r"holds no run|no config\.toml|no such file|not a run"),
    "a wrong flag": (["", "--n_lair 3"], None, r"unknown argument --n_lair"),
}


def test_incompatible_ranks_are_refused_in_one_line_that_names_the_cause(place, monkeypatch):
    monkeypatch.chdir(place)
    prepare((str(place / "text.txt"),), place / "other/data", "char", val_fraction=0.2)
    shutil.copytree(place / "data", place / "torn")
    (place / "torn/meta.json").unlink()
    with open(place / "torn/train.bin", "ab") as file:
        file.write(b"x")
    jobs = []
    for lines, change, _ in REFUSED.values():
        both = [line if "--resume" in line else with_small(line) for line in lines]
        both = [f"train {line} --out_dir refused" for line in both]
        both = [line if "--data_dir" in line or "--resume" in line else f"{line} --data_dir data" for line in both]
        jobs.append(job(rank_jobs.run_command, lines=both, change=change))
    by_job = run_world(2, jobs, place / "outcomes refused")
    for (what, (_, _, pattern)), outcomes in zip(REFUSED.items(), by_job, strict=True):
        assert require_values(outcomes) == [2, 2], what
        errors = [[line for line in one.err.splitlines() if "error" in line.lower()] for one in outcomes]
        assert len(errors[0] + errors[1]) == 1, (what, errors)
        assert re.search(pattern, (errors[0] + errors[1])[0]), (what, errors)
        assert not (place / "refused").exists(), what


def test_an_error_of_rank_0_ends_all_ranks(place, monkeypatch):
    """Rank 0 refuses a folder that holds a run: all ranks exit, only rank 0 prints, and the folder is unchanged.

    Also where torchrun restarts the job: that does not make the run its own.
    """
    monkeypatch.chdir(place)
    settings = SMALL | {"max_steps": 3, "data_dir": str(place / "data"), "out_dir": str(place / "held")}
    require_values(run_job(0, job(rank_jobs.train, settings=settings), place / "outcomes held"))
    before = {path: path.read_bytes() for path in (place / "held").rglob("*") if path.is_file()}
    line = f"train {flags()} --data_dir data --out_dir held"
    outcomes = run_job(4, job(rank_jobs.run_restarted, line=line), place / "outcomes again")
    assert require_values(outcomes) == [[2, 2]] * 4
    assert [one.err.count("error: ") for one in outcomes] == [2, 0, 0, 0]
    assert outcomes[0].err.count("holds a run saved at step 3") == 2
    assert {path: path.read_bytes() for path in (place / "held").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "given",
    [
        {"RANK": "-1", "WORLD_SIZE": "0"},
        {"RANK": "2"},
        {"LOCAL_RANK": "2"},
        {"MASTER_PORT": "99999"},
        {"MASTER_PORT": "x"},
        {"MASTER_ADDR": None},
    ],
)
def test_impossible_torchrun_variables_are_refused(monkeypatch, given):
    possible = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in (possible | given).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="start processes with torchrun, or unset RANK"):
        read_torchrun_environment()


def test_the_command_line_given_to_torchrun(monkeypatch):
    executed = []
    monkeypatch.setattr(os, "execve", lambda path, words, env: executed.append(words))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("RANK", raising=False)
    train.main(["--text", "a b.txt", "--nproc", "2", "--max_steps", "7"])
    assert executed[0][1:] == [
        *("-m", "llm.commands.launch", "--standalone", "--local_addr=127.0.0.1"),
        *("--nproc_per_node=2", "-m", "llm", "train"),
        *("--text=a b.txt", "--max_steps=7"),
    ]


@pytest.mark.parametrize(
    ("work", "last"),
    [
        ("print('error: x; try y', file=sys.stderr); sys.exit(2)", "error: x; try y"),
        ("1 / 0", "ZeroDivisionError: division by zero"),  # a traceback is passed on
    ],
)
def test_our_error_is_the_last_line_of_stderr(tmp_path, work, last):
    (tmp_path / "work.py").write_text(f"import os, sys\nif os.environ['RANK'] == '1': {work}\n", encoding="utf-8")
    command = [sys.executable, "-m", "llm.commands.launch", "--standalone", "--nproc_per_node=2", tmp_path / "work.py"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == last
    assert ended.stderr.count("Traceback") == last.startswith("Zero")
    assert "site-packages" not in ended.stderr


def test_a_rank_killed_by_a_signal_is_named(monkeypatch, capsys):
    def fail(args):
        raise ChildFailedError("llm", {1: ProcessFailure(1, 4711, -9, "<N/A>")})

    monkeypatch.setattr(torch.distributed.run, "run", fail)
    monkeypatch.setattr(logging, "disable", lambda level: None)
    assert launch.main(["--nproc_per_node=2", "work.py"]) == 1
    expected = "error: rank 1 (process 4711) was killed by SIGKILL (often: out of memory); continue with --resume\n"
    assert capsys.readouterr().err == expected
