"""Checkpoints for tests: save one, compare one bit for bit, forge the manifest of one."""

import hashlib
import json

import pytest
import torch

from llm.errors import UserError
from llm.storage.checkpoint import load_state, save_state


def groups(step=0):
    torch.manual_seed(step)
    return {
        "model": {"wte.weight": torch.randn(5, 3), "h.0.b": torch.randn(4).bfloat16(), "turned": torch.randn(4, 3).t()},
        "optimizer": {"step": torch.tensor(float(step)), "mask": torch.tensor([True, False]), "empty": torch.zeros(0)},
    }


def save(run, step, keep=2, best_step=None, **facts):
    return save_state(run, step, groups(step), {"note": f"at {step}", **facts}, keep, best_step)


def same_bits(found, expected):
    assert found.keys() == expected.keys()
    for group, tensors in expected.items():
        assert found[group].keys() == tensors.keys()
        for name, value in tensors.items():
            other = found[group][name]
            assert (other.dtype, other.shape) == (value.dtype, value.shape)
            ours, theirs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (value, other))
            assert torch.equal(ours, theirs)


def refused(folder):
    with pytest.raises(UserError) as caught:
        load_state(folder)
    return str(caught.value)


def resign(folder):
    """Write a manifest that matches whatever is in the folder, as an attacker would."""
    (folder / "manifest.json").unlink(missing_ok=True)
    files = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.is_file()
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
