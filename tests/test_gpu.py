"""What can be checked of the CUDA path without a GPU, and the script that measures one."""

import contextlib
import os

import torch

from llm.machine.device import fixed_order


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

