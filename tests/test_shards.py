"""Tokens in several files: the stream against a NumPy array of the same tokens, preparing against the same text in one
file and against tiktoken alone, and every command on such a folder.
"""

import gzip
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from conftest import CACHE, flags, needs_gpt2, words

from llm import storage
from llm.checks.verify import verify
from llm.config import from_settings
from llm.data import batch_at, open_data
from llm.errors import Failure, UserError
from llm.plan.text_size import text_of
from llm.prepare import choose_tokenizer, journal, prepare, shards
from llm.text import corpus
from llm.tokens import cut
from llm.tokens.sharded_stream import Shards
from llm.tokens.token_files import has_tokens, read_meta

DOCUMENTS = ["one two", "", "three, four: 5", "🙂 über", "six\nseven\n", "", "eight"]


def split_up(tokens, draw, pieces):
    borders = np.sort(draw.choice(np.arange(1, len(tokens)), pieces - 1, replace=False))
    return np.split(tokens, borders)


@pytest.mark.parametrize("pieces", [1, 2, 7, 60])
def test_several_files_are_read_as_their_tokens_in_one(pieces):
    draw = np.random.default_rng(pieces)
    tokens = draw.integers(0, 500, 400).astype("<u2")
    stream = Shards(split_up(tokens, draw, pieces))
    assert len(stream) == len(tokens)
    for shape in ((), (1,), (9,), (4, 6), (2, 3, 4), (0,), (3, 0)):
        places = draw.integers(-400, 400, shape)
        found = stream[places]
        assert np.array_equal(found, tokens[places])
        assert (found.shape, found.dtype) == (shape, tokens.dtype)
    for _ in range(400):
        start, stop = (None if draw.random() < 0.1 else int(n) for n in draw.integers(-450, 450, 2))
        step = int(draw.choice([1, 1, 1, 2, -1, -3, 50]))
        assert np.array_equal(stream[start:stop:step], tokens[start:stop:step]), (start, stop, step)
    assert stream[399] == tokens[399]
    for places in (400, -401, [0, 400], np.array([0.5]), np.array([True])):
        with pytest.raises(IndexError):
            stream[places]


@pytest.mark.parametrize("pieces", [2, 5, 90])
def test_a_batch_does_not_depend_on_the_files(pieces):
    draw = np.random.default_rng(pieces)
    tokens = draw.integers(0, 60_000, 300).astype("<u2")
    stream = Shards(split_up(tokens, draw, pieces))
    for step in range(20):
        ours, whole = batch_at(stream, 7, step, 6, 40), batch_at(tokens, 7, step, 6, 40)
        for name in ("x", "y", "seeds"):
            assert np.array_equal(getattr(ours, name), getattr(whole, name))
            assert getattr(ours, name).dtype == getattr(whole, name).dtype


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Make a folder `t` with several texts, one of them in rows; flushing takes no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    Path("t").mkdir()
    for number, text in enumerate([words(150), "", words(60, 1), "x"]):
        Path(f"t/{number}.txt").write_text(text, encoding="utf-8")
    rows = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(DOCUMENTS * 5))
    Path("t/rows.jsonl").write_text(rows, encoding="utf-8")
    return "t"


def content(folder, split):
    meta = json.loads(Path(folder, "meta.json").read_text())
    entry = meta["splits"][split]
    files = [shard["file"] for shard in entry.get("shards", [entry])]
    return b"".join(Path(folder, name).read_bytes() for name in files)


SIZES = [(kind, size) for kind in ("byte", "char", "bpe") for size in (7, 100, 333)]


@pytest.mark.parametrize(("kind", "size"), [*SIZES, ("byte", 1)])
def test_shards_hold_what_one_file_would(texts, kind, size, monkeypatch):
    more = {"vocab_size": 300} if kind == "bpe" else {}
    if size == 1:  # thousands of files
        Path("t/0.txt").unlink()
    prepare.prepare((texts,), Path("one"), kind, **more)
    monkeypatch.setattr(cut, "PIECE", 50)
    monkeypatch.setattr(cut.pieces, "__defaults__", (50,))
    meta = prepare.prepare((texts,), Path("many"), kind, shard_tokens=size, **more)
    one = read_meta(Path("one"))
    for split in ("train", "val"):
        ours, whole = dict(meta["splits"][split]), dict(one["splits"][split])
        assert content("many", split) == content("one", split)
        if whole["tokens"] <= size:
            assert ours == whole | {"mtime_ns": ours["mtime_ns"]}
            continue
        listed = ours.pop("shards")
        assert {key: whole[key] for key in ours} == ours
        assert [shard["tokens"] for shard in listed[:-1]] == [size] * (len(listed) - 1)
        assert 1 <= listed[-1]["tokens"] <= size
        for number, shard in enumerate(listed):
            path, info = Path("many", shard["file"]), Path("many", shard["file"]).stat()
            assert shard == {
                "file": f"{split}-{number:05d}.bin",
                "tokens": info.st_size // 2,
                "max_id": int(np.fromfile(path, "<u2").max()),
                "size": info.st_size,
                "mtime_ns": info.st_mtime_ns,
                "sha256": storage.sha256(path),
            }
    for key in ("vocab_used", "max_id", "end_of_text", "dtype", "tokenizer", "source", "settings"):
        assert meta[key] == one[key]
    assert {p.name for p in Path("many").iterdir() if not p.name.endswith(".bin")} == {
        "meta.json",
        "tokenizer.json",
        ".lock",
    }
    data, single = open_data(Path("many"), 8), open_data(Path("one"), 8)
    assert isinstance(single.train, np.memmap)
    assert set(data.hashes) == {shard["file"] for s in meta["splits"].values() for shard in s.get("shards", [s])}
    for step in range(5):
        assert np.array_equal(batch_at(data.train, 1, step, 4, 8).y, batch_at(single.train, 1, step, 4, 8).y)
    assert all(finding.good for finding in verify(Path("many")))


def test_a_text_that_fills_one_shard_is_one_file(texts):
    meta = prepare.prepare((texts,), Path("one"), "bpe", 300)
    tokens = meta["splits"]["train"]["tokens"]
    again = prepare.prepare((texts,), Path("d"), "bpe", 300, shard_tokens=tokens)
    assert "shards" not in again["splits"]["train"]
    assert set(os.listdir("d")) == {"train.bin", "val.bin", "meta.json", "tokenizer.json", ".lock"}
    for name in ("train.bin", "val.bin"):
        assert Path("d", name).read_bytes() == Path("one", name).read_bytes()
    more = prepare.prepare((texts,), Path("e"), "bpe", 300, shard_tokens=tokens - 1)
    assert [shard["tokens"] for shard in more["splits"]["train"]["shards"]] == [tokens - 1, 1]
    with pytest.raises(UserError, match="shard_tokens = 0"):
        prepare.prepare((texts,), Path("f"), "byte", shard_tokens=0)


@needs_gpt2
def test_rows_are_the_documents_of_tiktoken(tmp_path, monkeypatch):
    """The ids are those of each document by tiktoken alone, with its end-of-text between documents."""
    import tiktoken

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path(CACHE, "tiktoken")))
    reference = tiktoken.get_encoding("gpt2")
    documents = [words(20, seed) + DOCUMENTS[seed % 7] for seed in range(60)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(rows)
    monkeypatch.setattr(shards, "LARGE", 100)  # use worker processes
    monkeypatch.setattr(cut, "PIECE", 1000)
    prepare.prepare((str(tmp_path / "rows.jsonl.gz"),), tmp_path / "d", "gpt2", offline=True, shard_tokens=500)
    left, expected = int(sum(map(len, documents)) * 0.9), {"train": [], "val": []}
    for number, text in enumerate(documents):
        for split, part in (("train", text[: max(0, left)]), ("val", text[max(0, left) :])):
            expected[split] += reference.encode_ordinary(part)
        left -= len(text)
        if number < len(documents) - 1:
            expected["train" if left >= 0 else "val"].append(reference.eot_token)
    for split in ("train", "val"):
        assert np.frombuffer(content(tmp_path / "d", split), "<u2").tolist() == expected[split]


# opening such a folder


@pytest.fixture
def sharded(texts):
    prepare.prepare((texts,), Path("d"), "byte", shard_tokens=300)
    return Path("d")


def test_a_changed_shard_is_named(sharded):
    path = sharded / "train-00001.bin"
    before, info = path.read_bytes(), path.stat()
    path.write_bytes(before[:-1])
    with pytest.raises(UserError, match=r"train-00001\.bin: 599 bytes is not a whole number"):
        open_data(sharded, 8)
    path.write_bytes(before[:-2])
    with pytest.raises(UserError, match=r"describes a train-00001\.bin of 600 bytes, the file has 598"):
        open_data(sharded, 8)
    path.write_bytes(b"\x01\x00" + before[2:])
    with pytest.raises(UserError, match=r"train-00001\.bin: changed since it was prepared"):
        open_data(sharded, 8)
    assert [f.path.name for f in verify(sharded) if not f.good] == ["train-00001.bin"]
    path.unlink()
    with pytest.raises(UserError, match=r"train-00001\.bin: no such file"):
        open_data(sharded, 8)
    path.write_bytes(before)
    assert len(open_data(sharded, 8).train) > 600  # another time, so it is scanned; its content is the same
    assert list(json.loads((sharded / "scanned.json").read_text())) == ["train-00001.bin"]
    os.utime(path, ns=(info.st_mtime_ns, info.st_mtime_ns))
    (sharded / "meta.json").unlink()
    with pytest.raises(UserError, match=r"no meta\.json describes its shards"):
        open_data(sharded, 8)


CHANGES = [
    lambda entry: entry.update(shards=[]),
    lambda entry: entry.update(shards=3),
    lambda entry: entry.update(shards=[3]),
    lambda entry: entry.update(shards={"a": 1}),
    lambda entry: entry["shards"].reverse(),
    lambda entry: entry["shards"][1].update(file="../d/train-00001.bin"),
    lambda entry: entry["shards"][1].update(file="train.bin"),
    lambda entry: entry["shards"][1].pop("file"),
    lambda entry: entry["shards"][1].pop("sha256"),
    lambda entry: entry["shards"][1].update(size=-2),
    lambda entry: entry["shards"][1].update(size="600"),
    lambda entry: entry["shards"][1].update(mtime_ns=1.5),
    lambda entry: entry["shards"][1].update(max_id=None),
]


@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
def test_a_meta_with_wrong_shards(sharded, change):
    meta = json.loads((sharded / "meta.json").read_text())
    change(meta["splits"]["train"])
    (sharded / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"meta\.json: ") as caught:
        open_data(sharded, 8)
    assert "\n" not in str(caught.value)


def test_an_id_beyond_the_vocabulary_is_found_in_its_shard(sharded):
    meta = json.loads((sharded / "meta.json").read_text()) | {"vocab_size": 122}
    (sharded / "meta.json").write_text(json.dumps(meta))
    found = np.fromfile(sharded / "train-00000.bin", "<u2")
    with pytest.raises(UserError, match=r"\d\.bin: token \d+ has id \d+, and the vocabulary has 122"):
        open_data(sharded, 8)
    assert found.max() < 256


def test_shards_with_another_time_are_scanned_once(sharded, monkeypatch):
    seen, real = [], storage.sha256
    monkeypatch.setattr(storage, "sha256", lambda path: (seen.append(path.name), real(path))[1])
    names = ["train-00000.bin", "train-00002.bin"]
    for name in names:
        os.utime(sharded / name, ns=(5, 5))
    for _ in range(3):
        open_data(sharded, 8)
    assert seen == names


def sparse(folder: Path, tokens: int, each: int) -> None:
    """Make a prepared folder of zeros that takes no disk space."""
    folder.mkdir()
    splits = {}
    for split, count in (("train", tokens), ("val", 2 * each)):
        listed = []
        for number in range(-(-count // each)):
            path = folder / f"{split}-{number:05d}.bin"
            with open(path, "wb") as file:
                file.truncate(2 * min(each, count - number * each))
            info = path.stat()
            facts = {"size": info.st_size, "mtime_ns": info.st_mtime_ns, "max_id": 0, "sha256": "0" * 64}
            listed.append({"file": path.name, "tokens": info.st_size // 2} | facts)
        splits[split] = {"tokens": count, "shards": listed}
    meta = {"vocab_size": 50257, "dtype": "uint16", "source": {"name": "zeros"}, "splits": splits}
    (folder / "meta.json").write_text(json.dumps(meta))


def pages_and_bytes_read() -> tuple[int, int]:
    """Memory pages that this process has touched first, a scan of a memory map among them, and bytes by read()."""
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt + usage.ru_majflt, int(io["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="what a process has read is known on Linux only")
def test_ten_gibibytes_open_without_being_read(tmp_path):
    sparse(tmp_path / "d", 5 * 2**30, 2**27)
    pages, read = pages_and_bytes_read()
    data = open_data(tmp_path / "d", 1024)
    batch = batch_at(data.train, 1, 2, 64, 1024)
    more_pages, more_read = pages_and_bytes_read()
    assert (len(data.train), len(data.train.files), batch.x.shape) == (5 * 2**30, 40, (64, 1024))
    assert more_read - read < 2**20  # a shard has 256 MiB
    assert more_pages - pages < 8000  # 800; a scan takes 40,000, and more where the system maps fewer pages at a time


def test_replacing_a_folder_by_fewer_files_removes_the_old_ones(texts, monkeypatch):
    prepare.prepare((texts,), Path("d"), "byte", shard_tokens=300)
    prepare.prepare((texts,), Path("d"), "byte", overwrite=True)
    assert set(os.listdir("d")) == {"train.bin", "val.bin", "meta.json", "tokenizer.json", ".lock"}
    with pytest.raises(UserError, match=r"already holds meta\.json, tokenizer\.json, train\.bin, val\.bin; add"):
        prepare.prepare((texts,), Path("d"), "byte", shard_tokens=300)
    prepare.prepare((texts,), Path("d"), "byte", overwrite=True, shard_tokens=300)
    assert not Path("d/train.bin").exists()
    with pytest.raises(UserError, match=r"already holds .* more; add --overwrite"):
        prepare.prepare((texts,), Path("d"), "byte")
    # as if the process ended between the last move and the removal: opening the folder removes the old file
    Path("d/.prepared").mkdir()
    Path("d/train.bin").write_bytes(b"old")
    assert len(open_data(Path("d"), 8).train) > 300
    assert not Path("d/train.bin").exists()


# resuming


def interrupted(folder, text, after, **more):
    """Interrupt a preparation, as a kill would, after it has finished `after` shards."""
    real = journal.Journal.add

    def add(self, shard):
        real(self, shard)
        if len(self.shards) >= after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.Journal, "add", add)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare((text,), Path(folder), **{"tokenizer": "byte", "shard_tokens": 300} | more)


def whole(folder):
    found = {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file() and p.name != ".lock"}
    meta = json.loads(found.pop("meta.json"))
    for split in meta["splits"].values():
        for shard in split.get("shards", [split]):
            shard.pop("mtime_ns")
    return found | {"meta": meta}


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_finished_shards_are_not_written_again(texts, kind):
    size = 100 if kind == "bpe" else 300
    settings = {"tokenizer": kind, "shard_tokens": size} | ({"vocab_size": 300} if kind == "bpe" else {})
    prepare.prepare((texts,), Path("d"), **settings)
    expected = whole("d")
    count = sum(name.endswith(".bin") for name in expected)
    assert count > 4
    trained = []
    for after in range(1, count + 1):
        folder = Path(f"d{after}")
        interrupted(folder, texts, after, **settings)
        assert not has_tokens(folder)
        stamps = {p.name: p.stat().st_mtime_ns for p in (folder / ".partial").glob("*.bin")}
        assert len(stamps) == after
        notices = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(choose_tokenizer, "train_bpe", lambda *_: trained.append(1))
            prepare.prepare((texts,), folder, say=notices.append, **settings)
        assert whole(folder) == expected
        for name, stamp in stamps.items():
            path = folder / name if (folder / name).exists() else folder / f"{name[:3]}.bin"  # the only one
            assert path.stat().st_mtime_ns == stamp
        assert len(notices) == 2
        assert notices[0] == "t: reading 5 texts: 0.txt, 1.txt, 2.txt and 2 more"
        assert f"resuming an interrupted preparation; {after} shards" in notices[1]
        assert set(os.listdir(folder)) == set(os.listdir("d"))
    assert not trained


def test_another_text_or_other_settings_start_over(texts):

    def write(**files):
        for name, text in files.items():
            Path(f"t/{name[1:]}.txt").write_text(text, encoding="utf-8")
        return {}

    changes = {
        "settings": lambda: {"val_fraction": 0.2},
        "shards": lambda: {"shard_tokens": 301},
        "tokens": lambda: {"tokenizer": "char"},
        "small": lambda: {"shard_tokens": 10**6},
        "text": lambda: write(_0=words(150, 5)),
        "as many characters": lambda: write(_0=words(150, 5)[::-1]),
        "ends of files": lambda: write(_2="", _3=words(60, 1) + "x"),
    }
    for name, change in changes.items():
        interrupted(name, texts, 3)
        more = {"tokenizer": "byte", "shard_tokens": 300} | change()
        notices = []
        prepare.prepare((texts,), Path(name), say=notices.append, **more)
        assert notices[1:] == [f"{name}: discarding an unfinished preparation of another text or with other settings"]
        prepare.prepare((texts,), Path(f"{name}-again"), **more)
        for split in ("train", "val"):
            assert content(name, split) == content(f"{name}-again", split)
        assert set(os.listdir(name)) == set(os.listdir(f"{name}-again"))


def test_a_damaged_shard_and_those_after_it_are_written_again(texts):
    prepare.prepare((texts,), Path("d"), "byte", shard_tokens=300)
    for number, harm in enumerate(
        (lambda path: path.unlink(), lambda path: path.write_bytes(b"\1\0" * 300), lambda path: path.write_bytes(b""))
    ):
        interrupted(f"d{number}", texts, 4)
        harm(Path(f"d{number}/.partial/train-00002.bin"))
        notices = []
        prepare.prepare((texts,), Path(f"d{number}"), "byte", shard_tokens=300, say=notices.append)
        assert "; 2 shards (600 tokens)" in notices[1]
        assert whole(f"d{number}") == whole("d")


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b'{"key": 1}',
        b'{"key": KEY, "tokenizer": TOKENIZER, "shards": 3}',
        b'{"key": KEY, "tokenizer": TOKENIZER, "shards": [3]}',
        b'{"key": KEY, "tokenizer": TOKENIZER, "shards": [{"split": "../x", "tokens": 1, "bytes": 1, "max_id": 1,'
        b' "sha256": "", "next": [0, 0]}]}',
        b'{"key": KEY, "tokenizer": TOKENIZER, "shards": [{"split": "train", "tokens": 1, "bytes": 1, "max_id": 1,'
        b' "sha256": "", "next": [0, -1]}]}',
        b'{"key": KEY, "tokenizer": "0", "shards": []}',
    ],
)
def test_a_hostile_journal_is_not_trusted(texts, hostile):
    prepare.prepare((texts,), Path("d"), "byte", shard_tokens=300)
    interrupted("e", texts, 2)
    facts = json.loads(Path("e/.partial.json").read_text())
    for name in ("key", "tokenizer"):
        hostile = hostile.replace(name.upper().encode(), json.dumps(facts[name]).encode())
    Path("e/.partial.json").write_bytes(hostile)
    prepare.prepare((texts,), Path("e"), "byte", shard_tokens=300)
    assert whole("e") == whole("d")


@pytest.mark.parametrize("change", [lambda rows: rows[:200], lambda rows: rows.replace("three", "thrée")])
def test_a_text_that_changes_while_shards_are_written(texts, monkeypatch, change):
    real, path = corpus.documents_between, Path("t/rows.jsonl")

    def changing(source, survey, start, stop):
        if start:  # the validation split
            path.write_text(change(path.read_text(encoding="utf-8")).rpartition("\n")[0] + "\n", encoding="utf-8")
        return real(source, survey, start, stop)

    monkeypatch.setattr(shards, "documents_between", changing)
    with pytest.raises(Failure, match="changed while it was read"):
        prepare.prepare((texts,), Path("d"), "byte", shard_tokens=300)
    assert not has_tokens(Path("d"))


def test_an_unfinished_preparation_leaves_the_old_data_alone(texts):
    prepare.prepare((texts,), Path("d"), "char")
    before = {p.name: p.read_bytes() for p in Path("d").iterdir()}
    interrupted("d", texts, 3, overwrite=True)
    assert {name: Path("d", name).read_bytes() for name in before} == before
    assert isinstance(open_data(Path("d"), 8).train, np.memmap)
    assert Path("d/.partial/train-00002.bin").exists()  # opening does not remove finished shards
    notices = []
    prepare.prepare((texts,), Path("d"), "byte", overwrite=True, shard_tokens=300, say=notices.append)
    assert "3 shards" in notices[1]
    assert not Path("d/train.bin").exists()


# the commands


def test_training_on_shards_is_training_on_one_file(here, losscurve):
    assert losscurve("prepare text.txt --tokenizer char --data_dir one")[0] == 0
    code, out, err = losscurve("prepare text.txt --tokenizer char --data_dir many --shard_tokens 700")
    assert code == 0, err
    assert "wrote many/train-00000.bin to train-00006.bin, val.bin, meta.json, tokenizer.json" in out
    curves = {}
    for name in ("one", "many"):
        code, _, err = losscurve(f"train --data_dir {name} --out_dir runs/{name} {flags(max_steps=8)}")
        assert code == 0, err
        rows = [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        curves[name] = [(row["step"], row["split"], row["loss"]) for row in rows if "loss" in row]
    assert curves["one"] == curves["many"]
    assert len(curves["one"]) > 4
    code, out, err = losscurve("train --out_dir runs/many --resume --max_steps 10")
    assert code == 0, err
    for line in (
        "verify runs/many",
        "verify many",
        "show-batch --out_dir runs/many --step 3",
        "memorised runs/many --max_new_tokens 10 --num_samples 2",
        "report runs/many --out report.html",
    ):
        code, out, err = losscurve(line)
        assert code == 0, f"{line}: {out}{err}"
    assert (
        losscurve("show-batch --out_dir runs/many --step 3")[1]
        == losscurve("show-batch --out_dir runs/one --step 3")[1]
    )
    code, out, err = losscurve("train --data_dir many --text text.txt --out_dir runs/again " + flags(max_steps=3))
    assert code == 0, err  # the folder is reused
    assert text_of(from_settings({"data_dir": "many"})) == text_of(from_settings({"data_dir": "one"}))
    code, out, err = losscurve("verify runs/one")
    assert code == 0, out
    assert losscurve("prepare text.txt --tokenizer char --data_dir one --shard_tokens 700 --overwrite")[0] == 0
    code, out, err = losscurve("verify runs/one")
    assert code == 1
    assert "has no train.bin, which the run was trained on" in out
    os.rename("many/train-00003.bin", "many/x")
    code, out, err = losscurve("train --out_dir runs/many --resume --max_steps 12")
    assert (code, err.count("\n")) == (2, 1)
    assert "train-00003.bin: no such file" in err
