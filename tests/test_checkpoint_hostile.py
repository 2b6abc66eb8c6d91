"""Checkpoints that were forged: refused by name, and no code in them runs."""

import json
import os
import pickle
import struct

import pytest
from saved_runs import refused, resign, save

from llm import storage


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
def test_a_hostile_safetensors_file_is_refused_and_runs_nothing(tmp_path, monkeypatch, content):
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


def test_a_checkpoint_without_facts_is_refused(tmp_path):
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
    for target in (tmp_path / "elsewhere", os.devnull):  # reading another device might never end
        path.symlink_to(target)
        assert refused(folder).startswith(f"{path}: not a regular file")
        path.unlink()
