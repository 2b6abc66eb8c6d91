"""What can be checked of the CUDA path without a GPU, and the script that measures one."""

import contextlib
import os
import subprocess

import pytest
import torch
from conftest import ROOT

from benchmarks import gpu, gpu_checks
from llm.checks import prove
from llm.commands import train
from llm.commands.main import main
from llm.machine.device import fixed_order

# A Python that notes its arguments, and fails in the part whose name is in FAILS
FAKE_PYTHON = """#!/bin/bash
printf '%s\\0' "$@" END >>"$NOTES"
for word in "$@"; do [[ $word == "$FAILS" ]] && echo "SomeError: no such thing" >&2 && exit 3; done
echo "some figures"
"""


def flags():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


def test_a_run_on_cuda_adds_up_in_a_fixed_order_and_what_follows_it_as_before(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = flags()
    with fixed_order(torch.device("cpu")):
        assert flags() == before
    with contextlib.suppress(ZeroDivisionError), fixed_order(torch.device("cuda")):
        assert flags() == (True, False, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        raise ZeroDivisionError
    assert flags() == before


def test_every_side_of_ours_makes_steps_with_the_same_loss(monkeypatch):
    """But for the compiler, which is left out."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    cpu = torch.device("cpu")
    config = gpu.config_of("gpt2-124m", None, small=True)
    tokens, _ = gpu.tokens_for(100)
    sides = [None]
    for name in ("ours", "ours-any-order", "ours-compiled", "ours-plain-loss"):
        sides.append(gpu.ready_side(name, config, tokens, cpu, sides[-1]))
    losses = [side.facts["first_loss"] for side in sides[1:]]
    assert losses[0] == losses[1] == pytest.approx(losses[2], abs=1e-3)
    assert losses[3] < losses[0]  # its steps follow those of the compiled side


@pytest.fixture
def script(tmp_path):
    """`script(*arguments, fails=NAME)`: run the script with a Python that does nothing; (exit code, summary, calls)."""
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    notes = tmp_path / "notes"
    notes.touch()

    def run(*arguments, fails="", seconds="480"):
        out = tmp_path / "out"
        variables = {"PYTHON": str(python), "NOTES": str(notes), "FAILS": fails, "GPU_SECONDS": seconds}
        command = [ROOT / "benchmarks" / "gpu.sh", out, *arguments]
        finished = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=60)
        calls = [call.split("\0")[:-1] for call in notes.read_text().split("END\0") if call]
        return finished.returncode, (out / "summary.txt").read_text(), calls

    return run


class Stopped(Exception):
    """Raised where a command would begin to work."""


def check_flags(call, monkeypatch):
    """Parse the arguments of one call of Python as the program would. A wrong one raises or exits."""
    assert call[0] == "-m"
    if call[1] == "benchmarks.gpu":
        args = gpu.make_parser().parse_args(call[2:])
        assert set(args.sides.split(",")) <= set(gpu.SIDES)
        assert gpu.config_of(args.preset, args.batch_size, args.small).tokens_per_step > 0
    elif call[1] == "benchmarks.gpu_checks":
        gpu_checks.make_parser().parse_args(call[2:])
    elif call[1:3] == ["llm", "train"]:
        train.read_config(train.parse_flags(call[3:]))
    elif call[1:3] == ["llm", "prove-resume"]:
        monkeypatch.setattr(prove, "whole_run", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            main(call[2:])
    else:
        assert call[1:] == ["llm", "doctor"]


@pytest.mark.parametrize("mode", [[], ["--dry"]])
def test_every_command_of_the_script_has_flags_that_exist(script, monkeypatch, mode):
    code, summary, calls = script(*mode)
    assert code == 0
    assert len(calls) == 11
    assert summary.count(": ok (") == 11
    for call in calls:
        check_flags(call, monkeypatch)


def test_a_part_that_fails_costs_the_others_nothing(script):
    code, summary, calls = script(fails="gpt2-124m")
    assert code == 1
    assert len(calls) == 11
    assert "== gpt2-124m: FAILED, exit code 3" in summary
    assert "SomeError: no such thing" in summary
    assert summary.rstrip().endswith("failed: gpt2-124m")


def test_without_a_gpu_nothing_else_is_tried(script):
    code, summary, calls = script(fails="machine")
    assert (code, len(calls)) == (1, 1)
    assert "== check: FAILED" in summary


def test_what_no_longer_fits_in_the_time_is_named(script):
    code, summary, calls = script(seconds="10")
    assert (code, calls) == (1, [])
    assert "== check: NOT RUN" in summary
