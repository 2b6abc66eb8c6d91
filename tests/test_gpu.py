"""What can be checked of the CUDA path without a GPU, and the script that measures one."""

import contextlib
import os
import runpy
import subprocess

import pytest
import torch
from conftest import ROOT

from benchmarks import gpu, gpu_checks
from llm.checks import prove
from llm.commands import train
from llm.commands.main import main
from llm.config import TrainConfig
from llm.machine import device
from llm.machine.device import fixed_order
from llm.start import build

# A Python that notes its arguments, and fails in the part whose name is in FAILS
FAKE_PYTHON = """#!/bin/bash
printf '%s\\0' "$@" END >>"$NOTES"
for word in "$@"; do [[ $word == "$FAILS" ]] && echo "SomeError: no such thing" >&2 && exit 3; done
echo "some figures"
"""


class Stopped(Exception):
    """Raised where a command would begin to work."""


def flags():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


def test_a_run_on_cuda_adds_up_in_a_fixed_order_and_what_follows_it_as_before():
    before = flags()
    with fixed_order(torch.device("cpu")):
        assert flags() == before
    with contextlib.suppress(ZeroDivisionError), fixed_order(torch.device("cuda")):
        assert flags() == (True, False, False)
        raise ZeroDivisionError
    assert flags() == before


@pytest.mark.parametrize(("given", "expected"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_importing_sets_the_workspace_that_a_fixed_order_needs(monkeypatch, given, expected):
    """Not `fixed_order`: PyTorch reads it at its first product on the GPU, as for a sample before the run."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if given:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
    runpy.run_path(device.__file__)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == expected


@pytest.mark.parametrize(
    ("name", "local_rank", "current"), [("cuda", None, []), ("cuda:1", None, [1]), ("cuda", 1, [1]), ("auto", None, [])]
)
def test_a_run_makes_its_gpu_the_current_one(monkeypatch, name, local_rank, current):
    """PyTorch checks the device as it does with a GPU: it refuses one without a number."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(build, "fast_products", lambda device: None)  # it would change the products of other tests
    monkeypatch.setattr(build, "make_model", lambda config: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        build.build(TrainConfig(), None, None, device.choose_device(name, local_rank), torch.float32)
    assert chosen == current


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
