"""Batches against Philox's own stream and pinned numbers; token files with a user's mistakes."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest

from llm import storage
from llm.data import batch_at, open_data
from llm.errors import UserError
from llm.tokens import scan
from llm.tokens.token_files import GPT2_VOCAB

TOKENS = np.arange(1000, 1100, dtype="<u2")


def test_a_batch_is_philox_by_remainder():
    batch = batch_at(TOKENS, 1337, 7, 4, 8)
    raw = [int(n) for n in np.random.Philox(key=np.array([1337, 7], dtype=np.uint64)).random_raw(8)]
    starts = [n % (100 - 8) for n in raw[:4]]
    assert batch.x.tolist() == [[1000 + s + t for t in range(8)] for s in starts]
    assert batch.seeds.tolist() == [n // 2**33 for n in raw[4:]]
    assert (batch.x.dtype, batch.y.dtype, batch.seeds.dtype) == (np.int64, np.int64, np.int32)


def test_a_batch_never_changes():
    """Pinned numbers: a run of an older version resumes with the same batches."""
    batch = batch_at(TOKENS, 1337, 7, 4, 8)
    assert batch.x[:, 0].tolist() == [1002, 1002, 1006, 1083]
    assert batch.seeds.tolist() == [1565535385, 2127098869, 180227764, 1764244222]
    far = batch_at(TOKENS, 2**63 - 1, 10**9 - 1, 2, 1)
    assert far.x[:, 0].tolist() == [1049, 1076]


def test_a_batch_is_a_pure_function():
    first = batch_at(TOKENS, 5, 3, 6, 4)
    np.random.seed(0)
    batch_at(TOKENS, 5, 4, 6, 4)
    again = batch_at(TOKENS, 5, 3, 6, 4)
    for name in ("x", "y", "seeds"):
        assert np.array_equal(getattr(first, name), getattr(again, name))


def test_y_is_x_one_token_later():
    tokens = np.random.default_rng(0).integers(0, 500, 300).astype("<u2")
    batch = batch_at(tokens, 1, 1, 32, 16)
    assert np.array_equal(batch.x[:, 1:], batch.y[:, :-1])
    windows = {tuple(tokens[s : s + 17].tolist()) for s in range(300 - 16)}
    assert all((*x, y[-1]) in windows for x, y in zip(batch.x.tolist(), batch.y.tolist(), strict=True))


@pytest.mark.parametrize("other", [(1338, 7), (1337, 8), (7, 1337), (0, 0)])
def test_other_seeds_and_steps_draw_others(other):
    tokens = np.arange(60_000, dtype="<u2")
    ours, theirs = batch_at(tokens, 1337, 7, 64, 8), batch_at(tokens, *other, 64, 8)
    assert np.mean(ours.x[:, 0] == theirs.x[:, 0]) < 0.05
    assert np.mean(ours.seeds == theirs.seeds) < 0.05


def test_the_first_windows_do_not_depend_on_how_many_follow():
    few, many = batch_at(TOKENS, 1, 2, 3, 8), batch_at(TOKENS, 1, 2, 50, 8)
    assert np.array_equal(few.x, many.x[:3])
    assert np.array_equal(few.y, many.y[:3])


def test_every_start_is_drawn_and_none_beyond():
    tokens = np.arange(10, dtype="<u2")
    batch = batch_at(tokens, 0, 0, 4000, 7)
    counts = np.bincount(batch.x[:, 0])
    assert len(counts) == 3  # 0, 1, 2: the last window ends with the last token
    assert abs(counts - 4000 / 3).max() < 150  # five standard deviations
    assert batch.y.max() == 9
    assert batch_at(tokens, 0, 0, 5, 9).x.tolist() == [list(range(9))] * 5  # one legal start


def write(folder, train, val, dtype="<u2"):
    folder.mkdir(exist_ok=True)
    for name, ids in (("train", train), ("val", val)):
        np.asarray(ids, dtype=dtype).tofile(folder / f"{name}.bin")


def describe(folder, vocab_size=100, dtype="uint16"):
    """A meta.json by hand, for the files as they are."""
    splits = {}
    for name in ("train", "val"):
        path = folder / f"{name}.bin"
        content = path.read_bytes()
        splits[name] = {
            "size": len(content),
            "mtime_ns": path.stat().st_mtime_ns,
            "max_id": int(np.frombuffer(content, np.dtype(dtype).newbyteorder("<")).max()),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    meta = {"vocab_size": vocab_size, "dtype": dtype, "source": {"name": "a book"}, "splits": splits}
    (folder / "meta.json").write_text(json.dumps(meta))
    return meta


@pytest.fixture
def foreign(tmp_path):
    write(tmp_path / "data", np.arange(90), np.arange(10))
    return tmp_path / "data"


@pytest.fixture
def prepared(foreign):
    describe(foreign)
    return foreign


def refused(folder, block_size=8, vocab_size=None):
    with pytest.raises(UserError) as caught:
        open_data(folder, block_size, vocab_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def scans(monkeypatch):
    """The names of the files that were scanned, in order."""
    seen, real = [], storage.sha256
    monkeypatch.setattr(storage, "sha256", lambda path: (seen.append(path.name), real(path))[1])
    return seen


def test_a_foreign_file_is_gpt2s(foreign):
    data = open_data(foreign, 8)
    assert (data.vocab_size, data.foreign) == (GPT2_VOCAB, True)
    assert data.hashes["val.bin"] == hashlib.sha256(np.arange(10, dtype="<u2").tobytes()).hexdigest()
    assert data.train.tolist() == list(range(90))
    assert data.val.tolist() == list(range(10))
    assert data.train.dtype == np.dtype("<u2")
    assert open_data(foreign, 8, 90).vocab_size == 90


def test_a_prepared_folder_is_what_it_says(prepared, scans):
    data = open_data(prepared, 8)
    assert (data.vocab_size, data.foreign, data.source, data.folder) == (100, False, "a book", prepared)
    assert data.hashes["train.bin"] == hashlib.sha256(np.arange(90, dtype="<u2").tobytes()).hexdigest()
    assert set(data.hashes) == {"train.bin", "val.bin"}
    assert scans == []  # known from meta.json
    assert not (prepared / "scanned.json").exists()


def test_wide_ids(tmp_path):
    write(tmp_path / "d", [70_000] * 20, [1, 69_999], "<u4")
    describe(tmp_path / "d", 80_000, "uint32")
    assert open_data(tmp_path / "d", 8).train.max() == 70_000


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_a_file_that_is_not_there(foreign, name):
    (foreign / name).unlink()
    assert refused(foreign).startswith(f"{foreign / name}: no such file")
    assert "no such file" in refused(foreign / "nowhere")


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_a_truncated_or_empty_file(foreign, name):
    path = foreign / name
    path.write_bytes(b"123")
    assert refused(foreign).startswith(f"{path}: 3 bytes is not a whole number of uint16 ids")
    path.write_bytes(b"")
    assert refused(foreign).startswith(f"{path}: 0 tokens")
    path.unlink()
    path.mkdir()
    assert str(path) in refused(foreign)


def test_shorter_than_a_window(foreign):
    assert open_data(foreign, 89).train.size == 90
    message = refused(foreign, 90)
    assert message.startswith(f"{foreign / 'train.bin'}: 90 tokens, and a window needs 91")
    assert "--block_size below 90" in message
    write(foreign, np.arange(90), [1])
    assert refused(foreign).startswith(f"{foreign / 'val.bin'}: 1 tokens")
    write(foreign, np.arange(90), [1, 2])
    assert open_data(foreign, 8).val.size == 2  # evaluation takes a partial window


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_an_id_beyond_the_vocabulary(foreign, name, monkeypatch):
    monkeypatch.setattr(scan, "iterate_chunks", lambda t: ((s, t[s : s + 4]) for s in range(0, len(t), 4)))
    ids = np.fromfile(foreign / name, "<u2")
    ids[7], ids[9] = 60_000, 61_000
    ids.tofile(foreign / name)
    expected = f"{foreign / name}: token 7 has id 60000, and the vocabulary has 50257"
    assert refused(foreign).startswith(expected)
    assert refused(foreign).startswith(expected)  # the second time from scanned.json
    assert open_data(foreign, 8, 61_001).vocab_size == 61_001
    ids[9] = 61_001
    ids.tofile(foreign / name)
    assert "token 7 has id 60000" in refused(foreign, 8, 60_000)
    assert "token 9 has id 61001" in refused(foreign, 8, 61_001)


def test_an_id_beyond_what_meta_says(prepared):
    describe(prepared, vocab_size=89)
    assert "train.bin: token 89 has id 89, and the vocabulary has 89" in refused(prepared)
    describe(prepared, vocab_size=100)
    assert "vocab_size = 99 is below the 100" in refused(prepared, 8, 99)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "3",
        '"x"',
        "{}",
        "[" * 100_000,
        '{"splits": 3}',
        '{"splits": {"train": []}}',
        '{"splits": "train"}',
        "1" * 5000,
    ],
)
def test_a_meta_that_is_no_object(prepared, text):
    (prepared / "meta.json").write_text(text)
    assert refused(prepared).startswith(f"{prepared / 'meta.json'}: ")


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": "100"},
        {"vocab_size": True},
        {"vocab_size": -1},
        {"vocab_size": 1e2},
        {"dtype": "float16"},
        {"dtype": ["uint16"]},
        {"source": {}},
        {"source": {"name": 3}},
        {"source": None},
        {"splits": {}},
    ],
)
def test_a_meta_with_a_wrong_field(prepared, change):
    meta = describe(prepared) | change
    (prepared / "meta.json").write_text(json.dumps(meta))
    assert refused(prepared).startswith(f"{prepared / 'meta.json'}: ")


@pytest.mark.parametrize("field", ["size", "mtime_ns", "max_id", "sha256"])
@pytest.mark.parametrize("value", [None, -1, "x" * 3, 1.5, []])
def test_a_split_with_a_wrong_field(prepared, field, value):
    meta = describe(prepared)
    meta["splits"]["val"][field] = value
    (prepared / "meta.json").write_text(json.dumps(meta))
    if field == "sha256" and isinstance(value, str):
        os.utime(prepared / "val.bin", ns=(1, 1))  # then the SHA-256 is compared
        assert refused(prepared).startswith(f"{prepared / 'val.bin'}: changed")
    else:
        assert refused(prepared).startswith(f"{prepared / 'meta.json'}: ")


def test_a_meta_of_other_files(prepared):
    write(prepared, np.arange(91), np.arange(10))
    message = refused(prepared)
    assert "describes a train.bin of 180 bytes, the file has 182" in message
    assert message.startswith(str(prepared / "meta.json"))


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_a_changed_byte(prepared, name, scans):
    path = prepared / name
    before = path.stat().st_mtime_ns
    content = bytearray(path.read_bytes())
    content[4] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before, before))
    open_data(prepared, 8)  # size and time are the same: trusted
    assert scans == []
    os.utime(path, ns=(before + 1, before + 1))
    assert refused(prepared).startswith(f"{path}: changed since it was prepared")
    assert refused(prepared).startswith(f"{path}: changed since it was prepared")
    assert scans == [name]


def test_a_touched_file_is_scanned_once(prepared, scans):
    for name in ("train.bin", "val.bin"):
        os.utime(prepared / name, ns=(5, 5))
    for _ in range(3):
        open_data(prepared, 8)
    assert scans == ["train.bin", "val.bin"]
    os.utime(prepared / "val.bin", ns=(6, 6))
    open_data(prepared, 8)
    assert scans == ["train.bin", "val.bin", "val.bin"]


def test_a_foreign_file_is_scanned_once(foreign, scans):
    for _ in range(3):
        open_data(foreign, 8)
    assert scans == ["train.bin", "val.bin"]
    kept = json.loads((foreign / "scanned.json").read_text())
    assert [kept[name]["max_id"] for name in ("train.bin", "val.bin")] == [89, 9]
    np.full(10, 60_000, "<u2").tofile(foreign / "val.bin")
    os.utime(foreign / "val.bin", ns=(7, 7))
    assert "token 0 has id 60000" in refused(foreign)


BAD_SCANS = [
    b"",
    b"[]",
    b"nonsense",
    b"\xff",
    b"[" * 100_000,
    b"1" * 5000,
    b'{"x": NaN}',
    b'{"\\ud800": 1}',
    b'{"train.bin": 3, "val.bin": []}',
    b'{"train.bin": {}, "val.bin": {"size": 20}}',
]


@pytest.mark.parametrize("content", BAD_SCANS, ids=range(len(BAD_SCANS)))
def test_a_hostile_record_of_scans_is_ignored(foreign, scans, content):
    (foreign / "scanned.json").write_bytes(content)
    assert open_data(foreign, 8).train.size == 90
    assert scans == ["train.bin", "val.bin"]
    open_data(foreign, 8)
    assert scans == ["train.bin", "val.bin"]  # replaced by a good one


@pytest.mark.parametrize("max_id", ["x", None, True, 1.5, [], 10**9, "huge"])
def test_a_record_with_a_false_largest_id(foreign, max_id):
    """The record has the right size and time. It may cost a scan, but never refuses a good file."""
    open_data(foreign, 8)
    kept = json.loads((foreign / "scanned.json").read_text())
    kept["train.bin"]["max_id"] = "DIGITS" if max_id == "huge" else max_id
    (foreign / "scanned.json").write_text(json.dumps(kept).replace('"DIGITS"', "1" * 5000))
    assert open_data(foreign, 8).train.size == 90


def test_an_interrupted_preparation_is_rolled_forward(prepared, tmp_path):
    (prepared / ".prepared").mkdir()
    new = tmp_path / "new"
    write(new, np.arange(50), np.arange(40))
    describe(new, 60)
    for name in ("meta.json", "val.bin", "train.bin"):
        shutil.copy2(new / name, prepared / ".prepared" / name)
    os.replace(prepared / ".prepared" / "meta.json", prepared / "meta.json")  # died after the first
    data = open_data(prepared, 8)
    assert (data.train.size, data.val.size, data.vocab_size) == (50, 40, 60)
    assert not (prepared / ".prepared").exists()


def test_an_interrupted_preparation_is_undone(prepared):
    (prepared / ".preparing").mkdir()
    (prepared / ".preparing" / "train.bin").write_bytes(b"half")
    assert open_data(prepared, 8).train.size == 90
    assert not (prepared / ".preparing").exists()


def test_a_first_preparation_that_was_interrupted_is_not_foreign(tmp_path):
    (tmp_path / ".prepared").mkdir()
    write(tmp_path / ".prepared", np.arange(50), np.arange(40))
    describe(tmp_path / ".prepared", 60)
    assert not open_data(tmp_path, 8).foreign


def test_a_preparation_under_way_is_not_disturbed(prepared):
    (prepared / ".preparing").mkdir()
    with storage.locked(prepared, "x"):
        assert "in use by another process" in refused(prepared)
    assert (prepared / ".preparing").exists()


def test_a_read_only_folder(foreign, monkeypatch, scans):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(storage, "write_json", refuse)  # the tests may run as root, who is never refused
    for _ in range(2):
        assert open_data(foreign, 8).val.size == 10
    assert scans == ["train.bin", "val.bin"] * 2
    foreign.chmod(0o500)
    assert open_data(foreign, 8).val.size == 10
    assert not (foreign / "scanned.json").exists()
    foreign.chmod(0o700)


def test_token_files_are_not_written_to(foreign):
    data = open_data(foreign, 8)
    with pytest.raises(ValueError, match="read-only"):
        data.train[0] = 1
