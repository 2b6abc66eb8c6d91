"""Saved states: bit for bit what was put in, or refused by name; never fewer good ones after a failed save."""

import errno
import hashlib
import json
import os
import pickle
import struct

import numpy as np
import pytest
import safetensors.torch
import torch

from llm import storage
from llm.errors import UserError
from llm.storage import checkpoint
from llm.storage.checkpoint import folder_name, load_state, newest_state, save_state, saved_steps


def groups(step=0):
    torch.manual_seed(step)
    return {
        "model": {"wte.weight": torch.randn(5, 3), "h.0.b": torch.randn(4).bfloat16(), "turned": torch.randn(4, 3).t()},
        "optimizer": {"step": torch.tensor(float(step)), "mask": torch.tensor([True, False]), "empty": torch.zeros(0)},
    }


def save(run, step, keep=2, is_best=False, **facts):
    return save_state(run, step, groups(step), {"note": f"at {step}", **facts}, keep, is_best)


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
    """A manifest that fits whatever is in the folder: what an attacker would write."""
    (folder / "manifest.json").unlink(missing_ok=True)
    files = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.is_file()
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


def test_every_bit_comes_back(tmp_path):
    kinds = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]
    awkward = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, 3.4e38])
    saved = {
        "a": {
            f"{kind}.{shape}": (torch.randn(shape) * 50).to(kind) for kind in kinds for shape in ((), (0, 3), (2, 3))
        },
        "b": {"awkward": awkward, "bool": torch.tensor([True, False]), "name with é \n": torch.ones(1)},
        "c": {"turned": torch.randn(3, 4).t(), "cut": torch.arange(10)[3:7], "grad": torch.ones(2, requires_grad=True)},
    }
    facts = {"progress": {"step": 7, "loss": 0.1 + 0.2, "none": None}, "text": "é\n"}
    folder = save_state(tmp_path, 7, saved, facts, keep=1, is_best=False)
    assert folder == tmp_path / "step-000007"
    found, told = load_state(folder)
    same_bits(found, {group: {k: t.detach() for k, t in tensors.items()} for group, tensors in saved.items()})
    assert told == {"step": 7, **facts}
    assert (tmp_path / "latest").read_text() == "step-000007\n"
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("group", ["model", "optimizer", "one dtype", "none"])
def test_the_files_are_those_of_safetensors_own_writer(tmp_path, group):
    more = {"one dtype": {f'h.{i}.{kind} "é"': torch.randn(i, 3) for i in (10, 2, 0) for kind in "ab"}, "none": {}}
    save_state(tmp_path, 3, (every := groups(3) | more), {}, 2, False)
    dense = {name: value.contiguous() for name, value in every[group].items()}
    assert (tmp_path / folder_name(3) / f"{group}.safetensors").read_bytes() == safetensors.torch.save(dense)


def test_a_state_is_not_held_a_second_time_while_it_is_written():
    tensors = {f"{number}": torch.zeros(9) for number in range(3)}
    _, *written = checkpoint.pieces(tensors)
    assert [np.asarray(piece).ctypes.data for piece in written] == [value.data_ptr() for value in tensors.values()]


def test_the_saved_tensors_are_copies(tmp_path):
    ours = groups(1)
    kept = {g: {k: t.clone() for k, t in tensors.items()} for g, tensors in ours.items()}
    folder = save_state(tmp_path, 1, ours, {}, 1, False)
    for tensors in load_state(folder)[0].values():
        for t in tensors.values():
            t.zero_()
    same_bits(load_state(folder)[0], kept)
    same_bits(ours, kept)


def test_names_of_steps(tmp_path):
    assert [folder_name(n) for n in (0, 500, 999_999, 12_345_678)] == [
        "step-000000",
        "step-000500",
        "step-999999",
        "step-12345678",
    ]
    good = ["step-000010", "step-000002", "step-1000000"]
    bad = [
        "step-10",
        "step-0000010",
        "step-٠٠٠٠٠٣",
        "step-000004.bad",
        ".step-000005.tmp-1",
        "step-abc",
        "xstep-000006",
    ]
    for name in good + bad:
        (tmp_path / name).mkdir()
    (tmp_path / "step-000009").write_text("a file")
    assert saved_steps(tmp_path) == [2, 10, 1_000_000]
    assert saved_steps(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (1, None, [5]),
        (2, None, [4, 5]),
        (9, None, [1, 2, 3, 4, 5]),
        (1, 2, [2, 5]),
        (2, 5, [4, 5]),
        (2, 1, [1, 4, 5]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, keep, best, left):
    for step in range(1, 6):
        save(tmp_path, step, keep, is_best=step == best)
    assert saved_steps(tmp_path) == left
    for step in left:
        same_bits(load_state(tmp_path / folder_name(step))[0], groups(step))
    assert (tmp_path / "latest").read_text() == "step-000005\n"
    if best:
        assert (tmp_path / "best").read_text() == f"step-00000{best}\n"


def test_a_better_one_retires_the_best(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, 1, is_best=step in (1, 3))
    assert saved_steps(tmp_path) == [3, 5]


def test_a_spoiled_pointer_to_the_best_stops_no_save(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "best").write_bytes(b"\xff\xfe../..")
    save(tmp_path, 2)
    save(tmp_path, 3)
    assert saved_steps(tmp_path) == [2, 3]


@pytest.mark.parametrize("keep", [1, 2])
def test_states_that_were_passed_over_retire_no_good_one(tmp_path, keep):
    """A resume from step 1 past two bad ones: what it saves stays, though the bad ones are of later steps."""
    for step in (1, 5, 6):
        save(tmp_path, step, 9)
    for step in (5, 6):
        (tmp_path / folder_name(step) / "model.safetensors").write_bytes(b"bad")
    for step in (2, 3):
        save(tmp_path, step, keep)
        found, facts, passed = newest_state(tmp_path)
        same_bits(found, groups(step))
        assert facts["step"] == step
        assert len(passed) == 2
    assert saved_steps(tmp_path) == [*([3] if keep == 1 else [2, 3]), 5, 6]
    save(tmp_path, 5, keep)  # in the place of the bad one
    same_bits(load_state(tmp_path / folder_name(5))[0], groups(5))


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_named(tmp_path, name):
    path = save(tmp_path, 3) / name
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        message = refused(path.parent)
        assert str(path) in message or name == "manifest.json"
    path.write_bytes(content)
    load_state(path.parent)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["truncated", "empty", "removed", "linked"])
def test_a_spoiled_state_is_passed_over_and_said(tmp_path, name, how):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    content = path.read_bytes()
    path.unlink()
    if how in ("truncated", "empty"):
        path.write_bytes(content[:-2] if how == "truncated" else b"")
    elif how == "linked":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    assert refused(path.parent).startswith(str(path))
    found, facts, passed = newest_state(tmp_path)
    same_bits(found, groups(1))
    assert facts == {"step": 1, "note": "at 1"}
    assert len(passed) == 1
    assert str(path) in passed[path.parent]


def test_swapped_files_and_renamed_states_are_refused(tmp_path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    (first / "model.safetensors").rename(tmp_path / "x")
    (second / "model.safetensors").rename(first / "model.safetensors")
    (tmp_path / "x").rename(second / "model.safetensors")
    assert "model.safetensors" in refused(first)
    assert "model.safetensors" in refused(second)
    third = save(tmp_path, 3)
    third.rename(tmp_path / "step-000009")
    assert "the state of step 3, under another name" in refused(tmp_path / "step-000009")
    (tmp_path / "step-000009").rename(tmp_path / "a copy of mine")
    assert load_state(tmp_path / "a copy of mine")[1]["step"] == 3


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(UserError, match="no saved state to resume from; start anew"):
        newest_state(tmp_path)
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"step-000002.state\.json.*step-000001.state\.json"):
        newest_state(tmp_path)


@pytest.mark.parametrize(
    ("operation", "forever"), [("fsync", True), ("replace", False), ("mkdir", False), ("open", False), ("open", True)]
)
def test_a_failed_save_leaves_the_states_before(tmp_path, operation, forever):
    for k in range(1, 60):
        run = tmp_path / str(k)
        run.mkdir()
        save(run, 1, keep=1, is_best=True)
        save(run, 2, keep=1)
        count = 0
        with pytest.MonkeyPatch.context() as monkeypatch:
            real = open if operation == "open" else getattr(os, operation)

            def broken(*args, real=real, k=k, **kwargs):
                nonlocal count
                count += 1
                if count == k or (forever and count > k):
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real(*args, **kwargs)

            monkeypatch.setattr("builtins.open" if operation == "open" else f"os.{operation}", broken)
            try:
                save(run, 3, keep=1)
                failed = False
            except OSError:
                failed = True
        found, facts, passed = newest_state(run)
        same_bits(found, groups(facts["step"]))
        assert passed == {}
        assert facts["step"] in ((2, 3) if failed else (3,))
        same_bits(load_state(run / folder_name(1))[0], groups(1))  # the best
        assert (run / "latest").read_text() in (("step-000002\n", "step-000003\n") if failed else ("step-000003\n",))
        if count < k:
            assert not failed
            assert saved_steps(run) == [1, 3]
            break
    assert 2 <= k < 59


def test_older_states_go_only_after_the_new_one_stands(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2, keep=1)
    seen, real = [], checkpoint.storage.remove_folder

    def watched(folder):
        seen.append(folder.name)
        load_state(tmp_path / folder_name(3))
        real(folder)

    monkeypatch.setattr(checkpoint.storage, "remove_folder", watched)
    save(tmp_path, 3, keep=1)
    assert seen == ["step-000002"]


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def header(content):
    return struct.pack("<Q", len(content)) + content


HOSTILE = {
    "a pickle": pickle.dumps(Bomb()),
    "empty": b"",
    "short": b"\x01",
    "a huge header": struct.pack("<Q", 2**63) + b"{}",
    "a header beyond the file": struct.pack("<Q", 10**6) + b"{}",
    "no json": header(b"{]"),
    "not utf-8": header(b'{"\xff": 1}'),
    "deep json": header(b'{"a":' * 20_000),
    "a list": header(b"[]"),
    "no fields": header(b'{"a": {}}'),
    "an unknown dtype": header(b'{"a": {"dtype": "Q7", "shape": [1], "data_offsets": [0, 4]}}') + b"1234",
    "beyond the end": header(b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}') + b"1234",
    "another size": header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}') + b"1234",
    "an overflow": header(b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}'),
    "backwards": header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}') + b"1234",
    "negative": header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}') + b"1234",
    "a hole": header(b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [3, 4]}}') + b"1234",
    "left over": header(b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}') + b"1234",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_of_tensors_is_refused_and_runs_nothing(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    folder = save(tmp_path, 1)
    (folder / "model.safetensors").write_bytes(content)
    resign(folder)
    assert refused(folder).startswith(f"{folder / 'model.safetensors'}: not readable as safetensors")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "text", ["[]", "{}", "null", '{"step": "3"}', '{"step": 1.0}', "[" * 99_999, "1" * 5000, "\xff"]
)
def test_hostile_facts_are_refused(tmp_path, text):
    folder = save(tmp_path, 1)
    (folder / "state.json").write_bytes(text.encode("latin-1"))
    resign(folder)
    assert refused(folder).startswith(f"{folder / 'state.json'}: ")


def test_a_state_without_facts_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "state.json").unlink()
    resign(folder)
    assert refused(folder).startswith(f"{folder / 'state.json'}: ")


@pytest.mark.parametrize("name", ["../outside.safetensors", "..", "/outside.safetensors"])
def test_a_manifest_cannot_name_a_file_elsewhere(tmp_path, name):
    folder = save(tmp_path, 1)
    content = (folder / "model.safetensors").read_bytes()
    (tmp_path / "outside.safetensors").write_bytes(content)
    manifest = storage.read_json(folder / "manifest.json")
    name = str(tmp_path / name[1:]) if name.startswith("/") else name
    manifest["files"][name] = manifest["files"].pop("model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refused(folder)


def test_a_manifest_that_is_a_link_or_a_device_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    path = folder / "manifest.json"
    path.rename(tmp_path / "elsewhere")
    for target in (tmp_path / "elsewhere", os.devnull):  # another device could be read for ever
        path.symlink_to(target)
        assert refused(folder).startswith(f"{path}: not a regular file")
        path.unlink()


def test_an_old_state_that_cannot_be_removed_does_not_fail_the_save(tmp_path, monkeypatch):
    """A reader on a network file system, or a scanner on Windows, may hold its files for a while."""
    remove = storage.remove_folder

    def busy(folder):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(folder))

    save(tmp_path, 1, keep=1)
    monkeypatch.setattr(storage, "remove_folder", busy)
    for step in (2, 3):
        assert save(tmp_path, step, keep=1) == tmp_path / folder_name(step)
    assert storage.limits() == [
        f"{tmp_path}: old states could not be removed; the next save tries again (Device or resource busy)"
    ]
    monkeypatch.setattr(storage, "remove_folder", remove)
    save(tmp_path, 4, keep=1)
    assert saved_steps(tmp_path) == [4]
