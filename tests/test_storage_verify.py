"""Verification of folders against their manifest, and JSON files: damage is named, hostile content is refused."""

import errno
import hashlib
import json
import os

import pytest
from durable import NEW

from llm import storage
from llm.errors import UserError
from llm.storage import files


@pytest.fixture
def state(tmp_path):
    with storage.folder_in_place(tmp_path / "state") as folder:
        for name, text in NEW.items():
            (folder / name).write_bytes(text)
    return tmp_path / "state"


def test_any_flipped_bit_is_detected(state):
    storage.verify_folder(state)
    for path in sorted(state.iterdir()):
        content = path.read_bytes()
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= 1 << (place % 8)
            path.write_bytes(changed)
            with pytest.raises(UserError):
                storage.verify_folder(state)
        path.write_bytes(content)
    storage.verify_folder(state)


@pytest.mark.parametrize("name", [*NEW, "manifest.json"])
@pytest.mark.parametrize("how", ["truncated", "empty", "longer", "removed", "renamed", "linked", "folder"])
def test_a_changed_file_is_named(state, tmp_path, name, how):
    path = state / name
    content = path.read_bytes()
    if how in ("truncated", "empty", "longer"):
        path.write_bytes({"truncated": content[:-2], "empty": b"", "longer": content + b"!"}[how])
    elif how == "renamed":
        path.rename(state / "other")
    else:
        path.unlink()
    if how == "linked":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    if how == "folder":
        path.mkdir()
    with pytest.raises(UserError) as caught:
        storage.verify_folder(state)
    assert str(path) in str(caught.value)


def test_a_hidden_file_that_a_file_manager_left_harms_nothing(state):
    (state / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    storage.verify_folder(state)


def test_an_added_file_and_two_swapped_ones_are_named(state):
    (state / "added").write_bytes(b"")
    with pytest.raises(UserError, match="added: not in the manifest"):
        storage.verify_folder(state)
    (state / "added").rename(state / "x")
    (state / "a.txt").rename(state / "y")
    (state / "x").unlink()
    (state / "b.txt").rename(state / "a.txt")
    (state / "y").rename(state / "b.txt")
    with pytest.raises(UserError, match=r"a\.txt: changed since it was written"):
        storage.verify_folder(state)


@pytest.mark.parametrize("name", ["../secret", "/secret", "..", ".", "", "../state/a.txt", "secret\0", "manifest.json"])
def test_a_name_that_leaves_the_folder_is_refused(state, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_bytes(b"s")
    entry = {"size": 1, "sha256": hashlib.sha256(b"s").hexdigest()}
    for kept in NEW:
        (state / kept).unlink()
    (state / "a.txt").write_bytes(b"s")
    files = {"a.txt": entry}
    (state / "manifest.json").write_text(json.dumps({"files": files}))
    storage.verify_folder(state)
    files[name if name != "/secret" else str(secret)] = entry
    (state / "manifest.json").write_text(json.dumps({"files": files}))
    with pytest.raises(UserError):
        storage.verify_folder(state)


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"files": {}}', '{"files": []}', '{"files": {"a.txt": 3}}'])
def test_a_manifest_that_lists_nothing_is_refused(state, text):
    (state / "manifest.json").write_text(text)
    with pytest.raises(UserError):
        storage.verify_folder(state)


HOSTILE_JSON = {
    "empty": b"",
    "no json": b"{'a': 1}",
    "two values": b"1 2",
    "not utf-8": b'"\xff"',
    "utf-16": '"a"'.encode("utf-16"),
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000,
    "a long number": b"1" * 5000,
}


@pytest.mark.parametrize("content", HOSTILE_JSON.values(), ids=HOSTILE_JSON)
def test_invalid_json_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json: not readable as JSON"):
        storage.read_json(tmp_path / "x.json")


def test_a_huge_file_a_device_and_a_folder_are_not_read(tmp_path):
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(storage.JSON_LIMIT + 1)  # a sparse file
    (tmp_path / "link.json").symlink_to(os.devnull)  # reading another device might never end
    (tmp_path / "folder.json").mkdir()
    for name, reason in {"huge": "larger than", "link": "regular", "folder": "regular"}.items():
        with pytest.raises(UserError, match=rf"{name}\.json: .*{reason}"):
            storage.read_json(tmp_path / f"{name}.json")
    with pytest.raises(UserError, match=r"absent\.json"):
        storage.read_json(tmp_path / "absent.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}, {1: object()}, "\udcff"])
def test_a_value_that_json_cannot_hold_is_refused_before_the_file_is_touched(tmp_path, value):
    storage.write_json(tmp_path / "x.json", {"é": 1})
    with pytest.raises((ValueError, TypeError)):
        storage.write_json(tmp_path / "x.json", value)
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "é": 1\n}\n'
    assert os.listdir(tmp_path) == ["x.json"]
    assert storage.read_json(tmp_path / "x.json") == {"é": 1}


def test_json_too_large_to_read_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "JSON_LIMIT", 100)
    path = tmp_path / "a.json"
    storage.write_json(path, ["x" * 80])
    with pytest.raises(OSError, match="too large") as caught:
        storage.write_json(path, ["é" * 50])
    assert caught.value.errno == errno.EFBIG
    assert storage.read_json(path) == ["x" * 80]
