"""Checkpoints: restored bit for bit or refused by name; a failed save never costs an earlier checkpoint."""

import errno
import os

import numpy as np
import pytest
import safetensors.torch
import torch
from saved_runs import groups, refused, same_bits, save

from llm import storage
from llm.errors import UserError
from llm.storage import checkpoint
from llm.storage.checkpoint import folder_name, load_state, newest_state, save_state, saved_steps


def test_every_bit_is_restored(tmp_path):
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
    folder = save_state(tmp_path, 7, saved, facts, keep=1)
    assert folder == tmp_path / "step-000007"
    found, restored = load_state(folder)
    same_bits(found, {group: {k: t.detach() for k, t in tensors.items()} for group, tensors in saved.items()})
    assert restored == {"step": 7, **facts}
    assert [path.name for path in tmp_path.iterdir()] == ["step-000007"]


@pytest.mark.parametrize("group", ["model", "optimizer", "one dtype", "none"])
def test_files_equal_those_of_safetensors_own_writer(tmp_path, group):
    more = {"one dtype": {f'h.{i}.{kind} "é"': torch.randn(i, 3) for i in (10, 2, 0) for kind in "ab"}, "none": {}}
    every = groups(3) | more
    save_state(tmp_path, 3, every, {}, 2)
    dense = {name: value.contiguous() for name, value in every[group].items()}
    assert (tmp_path / folder_name(3) / f"{group}.safetensors").read_bytes() == safetensors.torch.save(dense)


def test_writing_a_checkpoint_copies_no_tensor():
    tensors = {f"{number}": torch.zeros(9) for number in range(3)}
    _, *written = checkpoint.serialize_tensors(tensors)
    assert [np.asarray(piece).ctypes.data for piece in written] == [value.data_ptr() for value in tensors.values()]


def test_the_saved_tensors_are_copies(tmp_path):
    ours = groups(1)
    kept = {g: {k: t.clone() for k, t in tensors.items()} for g, tensors in ours.items()}
    folder = save_state(tmp_path, 1, ours, {}, 1)
    for tensors in load_state(folder)[0].values():
        for t in tensors.values():
            t.zero_()
    same_bits(load_state(folder)[0], kept)
    same_bits(ours, kept)


def test_a_hidden_file_beside_the_tensors_is_none_of_them(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "._model.safetensors").write_bytes(b"\0\5\x16\7")  # macOS, on a disk of another system
    same_bits(load_state(folder)[0], groups(1))


def test_folder_names(tmp_path):
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
        save(tmp_path, step, keep, best if best and step >= best else None)
    assert saved_steps(tmp_path) == left
    for step in left:
        same_bits(load_state(tmp_path / folder_name(step))[0], groups(step))


def test_a_new_best_checkpoint_replaces_the_old_best(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, 1, best_step=1 if step < 3 else 3)
    assert saved_steps(tmp_path) == [3, 5]


@pytest.mark.parametrize("keep", [1, 2])
def test_skipped_checkpoints_do_not_push_out_a_good_one(tmp_path, keep):
    """After a resume from step 1, past two damaged ones, new checkpoints stay although the damaged ones are later."""
    for step in (1, 5, 6):
        save(tmp_path, step, 9)
    for step in (5, 6):
        (tmp_path / folder_name(step) / "model.safetensors").write_bytes(b"bad")
    for step in (2, 3):
        save(tmp_path, step, keep)
        found, facts, skipped = newest_state(tmp_path)
        same_bits(found, groups(step))
        assert facts["step"] == step
        assert len(skipped) == 2
    assert saved_steps(tmp_path) == [*([3] if keep == 1 else [2, 3]), 5, 6]
    save(tmp_path, 5, keep)  # replaces the damaged one
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
def test_a_damaged_checkpoint_is_skipped_and_reported(tmp_path, name, how):
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
    found, facts, skipped = newest_state(tmp_path)
    same_bits(found, groups(1))
    assert facts == {"step": 1, "note": "at 1"}
    assert len(skipped) == 1
    assert str(path) in skipped[path.parent]


def test_swapped_files_and_renamed_checkpoints_are_refused(tmp_path):
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
    with pytest.raises(UserError, match="no checkpoint to resume from; start a new run"):
        newest_state(tmp_path)
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"step-000002.state\.json.*step-000001.state\.json"):
        newest_state(tmp_path)


@pytest.mark.parametrize(
    ("operation", "forever"), [("fsync", True), ("replace", False), ("mkdir", False), ("open", False), ("open", True)]
)
def test_a_failed_save_keeps_earlier_checkpoints(tmp_path, operation, forever):
    for k in range(1, 60):
        run = tmp_path / str(k)
        run.mkdir()
        save(run, 1, keep=1, best_step=1)
        save(run, 2, keep=1, best_step=1)
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
                save(run, 3, keep=1, best_step=1)
                failed = False
            except OSError:
                failed = True
        found, facts, skipped = newest_state(run)
        same_bits(found, groups(facts["step"]))
        assert skipped == {}
        assert facts["step"] in ((2, 3) if failed else (3,))
        same_bits(load_state(run / folder_name(1))[0], groups(1))  # the best
        if count < k:
            assert not failed
            assert saved_steps(run) == [1, 3]
            break
    assert 2 <= k < 59


def test_older_checkpoints_are_removed_only_after_the_new_one_is_in_place(tmp_path, monkeypatch):
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


def test_an_old_checkpoint_that_cannot_be_removed_does_not_fail_the_save(tmp_path, monkeypatch):
    """A reader on a network file system, or a virus scanner on Windows, may hold its files open for a while."""
    remove = storage.remove_folder

    def busy(folder):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(folder))

    save(tmp_path, 1, keep=1)
    monkeypatch.setattr(storage, "remove_folder", busy)
    for step in (2, 3):
        assert save(tmp_path, step, keep=1) == tmp_path / folder_name(step)
    assert storage.limits() == [
        f"{tmp_path}: old checkpoints could not be removed; the next save tries again (Device or resource busy)"
    ]
    monkeypatch.setattr(storage, "remove_folder", remove)
    save(tmp_path, 4, keep=1)
    assert saved_steps(tmp_path) == [4]
