"""Files that were damaged, or made to do harm: refused by name, never loaded as something else, and no code runs."""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile

import numpy as np
import pytest
import torch

from llm.config import GPTConfig
from llm.data import open_data
from llm.errors import UserError
from llm.model import GPT
from llm.storage import checkpoint
from llm.weights import read_weights
from tests.faults import checks
from tests.faults.checks import flip

STATE = ["model.safetensors", "state.json", "manifest.json"]
CONFIG = GPTConfig(vocab_size=7, block_size=4, n_layer=1, n_head=1, n_embd=4)


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def newer(tmp_path):
    return checks.two_states(tmp_path)


def header_length(content, name):
    """Bytes before the tensors; JSON is a header from end to end."""
    return 8 + struct.unpack("<Q", content[:8])[0] if name.endswith(".safetensors") else len(content)


@pytest.mark.parametrize("name", STATE)
def test_every_bit_of_a_header(tmp_path, newer, name):
    path = newer / name
    content = path.read_bytes()
    assert header_length(content, name) > 25
    for at in range(header_length(content, name)):
        for bit in range(8):
            flip(path, content, at, 1 << bit)
            checks.falls_back(tmp_path, f"{name}, byte {at}, bit {bit}")
    path.write_bytes(content)
    assert checkpoint.newest_state(tmp_path)[1]["attempt"] == 2


@pytest.mark.parametrize("name", STATE)
def test_every_length_of_a_header(tmp_path, newer, name):
    path = newer / name
    content = path.read_bytes()
    lengths = range(header_length(content, name) if name != "manifest.json" else len(content.rstrip()))
    for length in lengths:  # a manifest without its last line break says the same
        path.write_bytes(content[:length])
        checks.falls_back(tmp_path, f"{name}, {length} bytes")


def test_random_bits_of_the_tensors(tmp_path):
    draw = random.Random(1)
    run = tmp_path / "run"
    for attempt in (1, 2):
        tensors = {**checks.groups(attempt)["model"], "large": torch.arange(30_000.0) + attempt}
        checkpoint.save_state(run, attempt, {"model": tensors}, {"attempt": attempt}, 2)
    path = run / checkpoint.folder_name(2) / "model.safetensors"
    content = path.read_bytes()
    for _ in range(60):
        flip(path, content, draw.randrange(len(content)), 1 << draw.randrange(8))
        with pytest.raises(UserError, match=r"model\.safetensors: changed"):
            checkpoint.load_state(path.parent)
    path.write_bytes(content)
    assert torch.equal(checkpoint.load_state(path.parent)[0]["model"]["large"], torch.arange(30_000.0) + 2)


def test_the_ends_of_the_tensors(tmp_path):
    checks.notices_flips(tmp_path)


@pytest.mark.parametrize("name", STATE)
def test_files_swapped_between_states(tmp_path, newer, name):
    older = tmp_path / checkpoint.folder_name(1)
    content = (older / name).read_bytes()
    (newer / name).write_bytes(content)
    checks.falls_back(tmp_path, f"{name} of the older state")


def test_states_under_another_name(tmp_path):
    checks.refuses_another_name(tmp_path / "run")


@pytest.mark.parametrize("name", STATE)
def test_a_file_that_is_gone_empty_or_something_else(tmp_path, newer, name):
    path = newer / name
    path.unlink()
    checks.falls_back(tmp_path, f"no {name}")
    path.mkdir()
    checks.falls_back(tmp_path, f"{name}, a folder")
    path.rmdir()
    for content in (b"", b"\0", b"\n", pickle.dumps(Bomb(tmp_path / "ran")), b"PK\3\4" + bytes(40)):
        path.write_bytes(content)
        checks.falls_back(tmp_path, f"{name}: {content[:20]!r}")
    assert not (tmp_path / "ran").exists()


def test_links(tmp_path):
    checks.refuses_links(tmp_path)


@pytest.mark.parametrize("name", STATE)
def test_a_link_to_nothing_to_itself_and_to_a_device(tmp_path, newer, name):
    (newer / name).unlink()
    for target in ("nothing", name, os.devnull, ".."):
        (newer / name).symlink_to(target)
        checks.falls_back(tmp_path, f"{name} -> {target}")
        (newer / name).unlink()


def resigned(newer, change):
    """The manifest as `change` leaves it; the hashes fit what is in the folder, as one who means harm would see to."""
    files = {path.name: path for path in newer.iterdir() if path.name != "manifest.json" and path.is_file()}
    entries = {name: {"size": path.stat().st_size, "sha256": _sha256(path)} for name, path in files.items()}
    manifest = {"files": entries}
    change(manifest)
    (newer / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


OUTSIDE = ["../outside", "../../outside", "./state.json", "x/../state.json", "/etc/passwd", "..", ".", "", "a\0b", "~"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_that_names_what_is_not_in_the_folder(tmp_path, newer, name):
    (tmp_path / "outside").write_bytes(b"secret")

    def change(manifest):
        manifest["files"][name] = {"size": 6, "sha256": _sha256(tmp_path / "outside")}

    resigned(newer, change)
    checks.falls_back(tmp_path, f"a manifest that names {name!r}", f"{newer / name}: ")


@pytest.mark.parametrize("size", [-1, 2**63, 10**400, 1.5, "84", None, True, [84], {}])
def test_a_manifest_with_another_size(tmp_path, newer, size):
    resigned(newer, lambda manifest: manifest["files"]["model.safetensors"].update(size=size))
    checks.falls_back(tmp_path, f"size {size!r:.20}")


@pytest.mark.parametrize("value", [None, [], {}, "x", 3, {"size": 84}, {"sha256": "x"}])
def test_a_manifest_with_another_entry(tmp_path, newer, value):
    resigned(newer, lambda manifest: manifest["files"].update({"model.safetensors": value}))
    checks.falls_back(tmp_path, f"entry {value!r}")
    resigned(newer, lambda manifest: manifest.update(files=value))
    checks.falls_back(tmp_path, f"files {value!r}")


DEEP = [b"[" * 200_000, b'{"files":' * 100_000, b"[" * 100_000 + b"]" * 100_000, b'"' + b"x" * 10**6, b"9" * 10**5]


@pytest.mark.parametrize("content", DEEP, ids=range(len(DEEP)))
@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_deep_and_endless_json(tmp_path, newer, name, content):
    (newer / name).write_bytes(content)
    if name == "state.json":
        resigned(newer, lambda manifest: None)
    checks.falls_back(tmp_path, f"{name}: {content[:10]!r}...")


def tensors_file(head, data=b""):
    content = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(content)) + content + data


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
TENSORS = {
    "a pickle": pickle.dumps(Bomb("ran")),
    "a header of 2**63": struct.pack("<Q", 2**63) + b"{}",
    "a header of 2**64 - 1": b"\xff" * 8 + b"{}",
    "a header of 99 MB": struct.pack("<Q", 99 * 10**6) + b"{}",
    "deep": tensors_file(b'{"a":' * 50_000),
    "deep lists": tensors_file(b"[" * 50_000),
    "no object": tensors_file(b"[]"),
    "a huge shape": tensors_file({"a": ENTRY | {"shape": [2**62, 2**62]}}, bytes(4)),
    "a shape of many": tensors_file({"a": ENTRY | {"shape": [1] * 9 + [2**40]}}, bytes(4)),
    "a negative shape": tensors_file({"a": ENTRY | {"shape": [-1]}}, bytes(4)),
    "beyond the end": tensors_file({"a": ENTRY | {"data_offsets": [0, 2**60], "shape": [2**58]}}, bytes(4)),
    "backwards": tensors_file({"a": ENTRY | {"data_offsets": [4, 0]}}, bytes(4)),
    "overlapping": tensors_file({"a": ENTRY, "b": ENTRY}, bytes(4)),
    "a hole": tensors_file({"a": ENTRY | {"data_offsets": [4, 8]}}, bytes(8)),
    "left over": tensors_file({"a": ENTRY}, bytes(8)),
    "no dtype": tensors_file({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "an unknown dtype": tensors_file({"a": ENTRY | {"dtype": "OBJECT"}}, bytes(4)),
}


@pytest.mark.parametrize("content", TENSORS.values(), ids=TENSORS)
def test_tensors_made_to_do_harm(tmp_path, monkeypatch, newer, content):
    """The hashes fit: what is in the file has to be refused for itself."""
    monkeypatch.chdir(tmp_path)
    (newer / "model.safetensors").write_bytes(content)
    resigned(newer, lambda manifest: None)
    checks.falls_back(tmp_path, "tensors")
    assert not (tmp_path / "ran").exists()


def test_any_header_that_is_vouched_for(tmp_path, newer):
    """Flipped bits under hashes that fit: loaded or refused, and no other end."""
    path = newer / "model.safetensors"
    content = path.read_bytes()
    refused = 0
    for at in range(header_length(content, path.name)):
        for bit in range(8):
            flip(path, content, at, 1 << bit)
            resigned(newer, lambda manifest: None)
            try:
                checkpoint.load_state(newer)
            except UserError as error:
                checks.says(error, f"byte {at}, bit {bit}", str(path))
                refused += 1
    assert refused > 200


# Token files.


def token_folder(folder):
    folder.mkdir()
    splits = {}
    for split, ids in (("train", np.arange(90)), ("val", np.arange(10))):
        path = folder / f"{split}.bin"
        content = ids.astype("<u2").tobytes()
        path.write_bytes(content)
        splits[split] = {
            "size": len(content),
            "mtime_ns": path.stat().st_mtime_ns,
            "max_id": int(ids.max()),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    meta = {"vocab_size": 100, "dtype": "uint16", "source": {"name": "a book"}, "splits": splits}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


def opens_the_same_or_refuses(folder, what):
    """True if the folder was refused; if not, its tokens are what they were."""
    try:
        data = open_data(folder, 8)
    except UserError as error:
        checks.says(error, what, str(folder))
        return True
    assert (data.train.dtype, data.val.dtype) == (np.dtype("<u2"),) * 2, what
    assert data.train.tolist() == list(range(90)), what
    assert data.val.tolist() == list(range(10)), what
    assert data.vocab_size > 89, what
    return False


def test_every_bit_of_the_description_of_tokens(tmp_path):
    folder = token_folder(tmp_path / "data")
    path = folder / "meta.json"
    content, refused = path.read_bytes(), 0
    for at in range(len(content)):
        for bit in range(8):
            flip(path, content, at, 1 << bit)
            refused += opens_the_same_or_refuses(folder, f"meta.json, byte {at}, bit {bit}")
            (folder / "scanned.json").unlink(missing_ok=True)
    assert refused > 4 * len(content)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert opens_the_same_or_refuses(folder, f"meta.json, {length} bytes")


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_every_byte_and_length_of_tokens(tmp_path, name):
    folder = token_folder(tmp_path / "data")
    path = folder / name
    content = path.read_bytes()
    for at in range(len(content)):
        flip(path, content, at, 1 << at % 8)
        os.utime(path, ns=(at, at))
        assert opens_the_same_or_refuses(folder, f"{name}, byte {at}")
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert opens_the_same_or_refuses(folder, f"{name}, {length} bytes")


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
def test_token_files_that_are_something_else(tmp_path, name):
    folder = token_folder(tmp_path / "data")
    path = folder / name
    for content in (b"", pickle.dumps(Bomb(tmp_path / "ran")) * 2, b"[" * 200_000, b"{}", b"\xff" * 180):
        path.write_bytes(content)
        assert opens_the_same_or_refuses(folder, f"{name}: {content[:10]!r}")
    path.unlink()
    path.mkdir()
    assert opens_the_same_or_refuses(folder, f"{name}, a folder")
    assert not (tmp_path / "ran").exists()


def test_token_files_swapped(tmp_path):
    folder = token_folder(tmp_path / "data")
    (folder / "train.bin").rename(folder / "x")
    (folder / "val.bin").rename(folder / "train.bin")
    (folder / "x").rename(folder / "val.bin")
    assert opens_the_same_or_refuses(folder, "swapped")


# Weights.


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    model = GPT(CONFIG)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    return tmp_path / "model.pt", expected


def reads_the_same_or_refuses(path, expected, what):
    """True if the file was refused; if not, it holds the weights that it held."""
    try:
        config, found = read_weights(path, CONFIG)
    except UserError as error:
        checks.says(error, what, str(path))
        return True
    assert config == CONFIG, what
    assert found.keys() == expected.keys(), what
    assert all(torch.equal(found[name], value) for name, value in expected.items()), what
    return False


def test_flipped_bytes_of_weights(weights):
    path, expected = weights
    content, refused = path.read_bytes(), 0
    assert not reads_the_same_or_refuses(path, expected, "as it was")
    for at in range(0, len(content), 7):
        flip(path, content, at, 1 << at % 8)
        refused += reads_the_same_or_refuses(path, expected, f"byte {at}")
    assert refused > len(content) / 7 / 3  # the rest is padding and fields that nobody reads
    for length in range(0, len(content), 41):
        path.write_bytes(content[:length])
        assert reads_the_same_or_refuses(path, expected, f"{length} bytes")


def test_an_entry_that_is_marked_as_a_folder(weights):
    """One bit in a .pt file's list of entries: torch then reads nothing for the entry, and takes what is in memory."""
    path, expected = weights
    content = path.read_bytes()
    entries = [at for at in range(len(content)) if content.startswith(b"PK\1\2", at)]
    assert len(entries) > len(expected)
    for at in entries:
        flip(path, content, at + 38, 0x10)
        reads_the_same_or_refuses(path, expected, f"byte {at + 38}")


def test_every_bit_of_the_weights_themselves(weights):
    path, expected = weights
    content = path.read_bytes()
    data = next(value for value in expected.values() if value.numel() >= 16).numpy().tobytes()
    start = content.index(data)
    for at in range(start, start + len(data)):
        flip(path, content, at, 1 << at % 8)
        assert reads_the_same_or_refuses(path, expected, f"byte {at}")


def test_a_pickle_with_code_does_not_run(tmp_path, weights):
    path, expected = weights
    ran, hostile = tmp_path / "ran", expected | {"wte.weight": Bomb(tmp_path / "ran")}
    for save in (
        lambda: torch.save(hostile, path),
        lambda: torch.save(hostile, path, _use_new_zipfile_serialization=False),
        lambda: torch.save(Bomb(ran), path),
        lambda: path.write_bytes(pickle.dumps(hostile)),
        lambda: path.write_bytes(pickle.dumps(Bomb(ran))),
        lambda: path.write_bytes(with_pickle(path.read_bytes(), pickle.dumps(Bomb(ran), 2))),
    ):
        torch.save(expected, path)
        save()
        assert reads_the_same_or_refuses(path, expected, "a pickle with code")
        assert not ran.exists()
    pickle.loads(pickle.dumps(Bomb(ran)))
    assert ran.exists()  # it would have


def with_pickle(archive, content):
    """The same .pt file with another pickle in it, every checksum right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    return out.getvalue()


@pytest.mark.parametrize("value", [3, None, [], "x", torch.zeros(3), {"wte.weight": 3}, {1: torch.zeros(2)}])
def test_a_file_that_holds_no_weights(weights, value):
    path, expected = weights
    torch.save(value, path)
    assert reads_the_same_or_refuses(path, expected, repr(value))


def test_weights_of_other_shapes(weights):
    path, expected = weights
    for name, value in expected.items():
        for other in (value[None], value.flatten()[:1], value.to_sparse() if value.dim() == 2 else value[:0]):
            torch.save(expected | {name: other}, path)
            assert reads_the_same_or_refuses(path, expected, f"{name} as {tuple(other.shape)} {other.layout}")
    shutil.rmtree(path.parent)
    with pytest.raises(UserError, match="no such file"):
        read_weights(path, CONFIG)
