"""Preparing token files: the split, meta.json, any piece size, interruptions, and refused input."""

import hashlib
import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import SMALL, hostile, needs_gpt2

from llm import storage
from llm.commands.main import run_command
from llm.config import from_settings
from llm.errors import Failure, UserError
from llm.prepare import choose_tokenizer, reuse, shards
from llm.prepare import prepare as preparing
from llm.prepare.prepare import FILES, prepare
from llm.prepare.reuse import ensure
from llm.text import corpus, text_file
from llm.tokens import cut, meta_json
from llm.tokens.saved_tokenizer import load_tokenizer
from llm.tokens.tokenizer import Characters

TEXT = "The quick brown fox, it's 1234 jumps.\n\n  Über  den Hund 🙂\r\n" * 40


@pytest.fixture
def book(tmp_path: Path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_bytes(TEXT.encode())
    return "book.txt"


def ids(folder: Path | str, split: str) -> np.ndarray:
    return np.fromfile(Path(folder, f"{split}.bin"), dtype=json.loads(Path(folder, "meta.json").read_text())["dtype"])


def state(folder: Path | str) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).iterdir() if p.is_file()}


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
@pytest.mark.parametrize("fraction", [0.1, 0.25])
def test_what_is_written(book: str, kind: str, fraction: float) -> None:
    seen = []
    meta = prepare(
        (book,), Path("d"), kind, 300 if kind == "bpe" else None, fraction, progress=lambda *at: seen.append(at)
    )
    assert json.loads(Path("d/meta.json").read_text()) == meta
    tokens = load_tokenizer(Path("d/tokenizer.json"))
    place = int(len(TEXT) * (1 - fraction))
    used = set()
    for name, part in (("train", TEXT[:place]), ("val", TEXT[place:])):
        split, found = meta["splits"][name], ids("d", name)
        used |= set(found.tolist())
        assert tokens.decode(found) == part
        assert found.tolist() == tokens.encode(part).tolist()
        info = os.stat(f"d/{name}.bin")
        assert split == {
            "file": f"{name}.bin",
            "tokens": len(found),
            "bytes": len(part.encode()),
            "characters": len(part),
            "max_id": int(found.max()),
            "size": info.st_size,
            "mtime_ns": info.st_mtime_ns,
            "sha256": storage.sha256(Path(f"d/{name}.bin")),
        }
    assert meta["tokenizer"] == {
        "kind": kind,
        "vocab_size": tokens.vocab_size,
        "sha256": storage.sha256(Path("d/tokenizer.json")),
    }
    assert (meta["format"], meta["version"], meta["dtype"]) == ("losscurve tokens", 1, "uint16")
    assert (meta["vocab_used"], meta["max_id"], meta["vocab_size"]) == (len(used), max(used), tokens.vocab_size)
    assert meta["end_of_text"] == tokens.end_of_text
    assert meta["source"] == {
        "name": "book",
        "files": (stamps := [{"path": book, "size": len(TEXT.encode()), "mtime_ns": os.stat(book).st_mtime_ns}]),
        "more": 0,
        "stamps": hashlib.sha256(json.dumps(stamps, sort_keys=True).encode()).hexdigest(),
        "documents": 1,
        "bytes": len(TEXT.encode()),
        "characters": len(TEXT),
        "sha256": hashlib.sha256(TEXT.encode()).hexdigest(),
        "ends": hashlib.sha256(f"[{len(TEXT)}]".encode()).hexdigest(),
    }
    assert seen[-1] == (len(TEXT), len(TEXT))
    assert set(state("d")) == {*FILES, ".lock"}


@needs_gpt2
def test_tiny_shakespeare_has_nanogpts_split(tmp_path: Path) -> None:
    if not (storage.cache_folder() / "tinyshakespeare" / "input.txt").exists():
        pytest.skip("tiny Shakespeare is not in LOSSCURVE_CACHE")
    import tiktoken

    meta = prepare((), tmp_path / "d", offline=True)
    text = (storage.cache_folder() / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    place = int(len(text) * 0.9)
    reference = tiktoken.get_encoding("gpt2") if "TIKTOKEN_CACHE_DIR" in os.environ else None
    assert [meta["splits"][name]["tokens"] for name in ("train", "val")] == [301_966, 36_059]
    if reference:
        assert ids(tmp_path / "d", "val").tolist() == reference.encode_ordinary(text[place:])
    meta = prepare(("shakespeare",), tmp_path / "c", "char", offline=True)
    assert (meta["vocab_size"], meta["splits"]["train"]["tokens"]) == (65, 1_003_854)


def test_end_of_text_between_documents(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t").mkdir()
    texts = ["ab", "", "cdé", "", "f", "gh", ""]
    for i, text in enumerate(texts):
        Path(f"t/{i}.txt").write_text(text)
    whole = [*b"ab", 256, *"cdé".encode(), 256, *b"f", 256, *b"gh"]
    for fraction in (0.2, 0.3, 0.4, 0.55, 0.7, 0.85):
        meta = prepare(("t",), Path("d"), "byte", val_fraction=fraction, overwrite=True)
        train, val = ids("d", "train").tolist(), ids("d", "val").tolist()
        assert train + val == whole
        assert val[0] != 256  # it ends a document
        assert bytes(i for i in train if i < 256).decode() == "abcdéfgh"[: int(8 * (1 - fraction))]
    assert meta["source"]["documents"] == 4
    prepare(("t",), Path("d"), "char", overwrite=True)
    assert len(ids("d", "train")) + len(ids("d", "val")) == 8


@settings(deadline=None, max_examples=40)
@given(
    *[hostile.map(lambda text: text.replace("\0", "\1"))] * 2, st.integers(1, 9), st.integers(1, 6), st.integers(1, 3)
)
def test_piece_size_and_workers_change_no_id(first: str, second: str, chunk: int, piece: int, cores: int) -> None:
    import tempfile

    text = first + " ab"
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name, part in (("a.txt", text), ("b.txt", second)):
            Path(folder, name).write_bytes(part.encode())
        text, second = text.removeprefix("\ufeff"), second.removeprefix("\ufeff")
        patch.setattr(text_file, "CHUNK", chunk)
        patch.setattr(cut.pieces, "__defaults__", (piece,))
        patch.setattr(shards, "cores", lambda: cores)
        patch.setattr(choose_tokenizer, "train_bpe", lambda *_: SMALL)
        meta = prepare((folder,), Path(folder, "d"), "bpe")
        place = int(len(text + second) * 0.9)
        end = [SMALL.end_of_text] if second and place >= len(text) else []
        train = SMALL.encode(text[:place]).tolist() + end + SMALL.encode(second[: max(0, place - len(text))]).tolist()
        end = [SMALL.end_of_text] if second and place < len(text) else []
        val = SMALL.encode(text[place:]).tolist() + end + SMALL.encode(second[max(0, place - len(text)) :]).tolist()
        assert ids(Path(folder, "d"), "train").tolist() == train
        assert ids(Path(folder, "d"), "val").tolist() == val
        assert meta["splits"]["train"]["bytes"] + meta["splits"]["val"]["bytes"] == len((text + second).encode())


def test_large_vocabularies_are_uint32(tmp_path: Path) -> None:
    text = "".join(chr(i) for i in [*range(0x4E00, 0x9000), *range(0x20000, 0x2D000)])
    (tmp_path / "a.txt").write_text(text)
    meta = prepare((str(tmp_path / "a.txt"),), tmp_path / "d", "char")
    assert (meta["dtype"], meta["vocab_size"]) == ("uint32", len(text))
    assert ids(tmp_path / "d", "val").tolist() == list(range(int(len(text) * 0.9), len(text)))


def test_a_character_that_a_given_tokenizer_lacks_is_named_with_its_text(tmp_path: Path) -> None:
    (tmp_path / "new.txt").write_text("ab" * 200 + "c")
    with pytest.raises(UserError) as caught:
        prepare((str(tmp_path / "new.txt"),), tmp_path / "d", "char", given=Characters("ab"))
    assert str(caught.value).startswith(
        "new: character 'c' (U+0063) is not in the vocabulary of 2 characters; remove it, "
    )


def test_bpe_of_a_large_text_sees_an_even_sample(book: str, monkeypatch) -> None:
    monkeypatch.setattr(text_file, "CHUNK", 10)
    monkeypatch.setattr(choose_tokenizer, "SAMPLE", 500)
    notices = []
    taught = []
    monkeypatch.setattr(choose_tokenizer, "train_bpe", lambda text, size: taught.extend(text) or SMALL)
    prepare((book,), Path("d"), "bpe", say=notices.append)
    assert 450 <= sum(map(len, taught)) <= 510
    assert ["evenly spread" in line for line in notices] == [False, True]  # the other notice is about CRLF
    assert len({part[:3] for part in taught}) > 5


# interruptions


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_anywhere_leaves_old_or_new_files(book: str, monkeypatch, error: type[BaseException]) -> None:
    prepare((book,), Path("new"), "byte")
    new = state("new")
    outcomes = set()
    replace, real = os.replace, 0
    for k in range(1, 20):
        folder = Path(f"d{k}")
        prepare((book,), folder, "char")
        old = state(folder)
        calls = iter(range(1, 100))

        def failing(a, b, k=k, calls=calls):
            if next(calls) == k:
                raise error(28, "No space left on device")
            replace(a, b)

        monkeypatch.setattr(os, "replace", failing)
        try:
            prepare((book,), folder, "byte", overwrite=True)
            real = k
        except (KeyboardInterrupt, Failure):
            pass
        monkeypatch.setattr(os, "replace", replace)
        # the next start: `train` asks for the folder, and finds one of the two whole
        ensure(from_settings({"data_dir": str(folder)}))
        found = state(folder)
        outcome = [name for name, want in (("old", old), ("new", new)) if _same(found, want)]
        assert outcome, k
        outcomes |= set(outcome)
        assert not storage.unfinished(folder)
        if real:
            break
    assert real > 5  # every rename failed once
    assert outcomes == {"old", "new"}


def _same(found: dict[str, str], wanted: dict[str, str]) -> bool:
    """Whether two folders are equal but for meta.json, which holds modification times."""
    return all(found.get(name) == wanted[name] for name in ("train.bin", "val.bin", "tokenizer.json")) and len(
        found
    ) == len(wanted)


def test_an_interrupted_first_preparation_is_repeated(book: str, monkeypatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.ShardWriter, "write", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare((book,), Path("d"), "byte")
    assert set(state("d")) <= {".lock"}
    Path("d/.preparing").mkdir()  # as a kill leaves it
    Path("d/.preparing/train.bin").write_bytes(b"half")
    assert ensure(from_settings({"text": book, "data_dir": "d", "tokenizer": "byte"})) == Path("d")
    assert len(ids("d", "train")) == len(TEXT[: int(len(TEXT) * 0.9)].encode())


def test_a_text_that_changes_while_it_is_read(book: str, monkeypatch) -> None:
    def changing(*args):
        Path(book).write_bytes(TEXT.encode()[:30])
        return iter([TEXT])

    monkeypatch.setattr(choose_tokenizer, "_sample", changing)
    with pytest.raises(Failure, match="changed while it was read"):
        prepare((book,), Path("d"), "bpe", 300)
    assert set(state("d")) == {".lock"}


# refused input


def test_bad_input_is_refused_before_anything_is_written(book: str, monkeypatch) -> None:
    Path("empty.txt").touch()
    Path("bom.txt").write_bytes("\ufeff".encode())
    Path("one.txt").write_text("a")
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("folder").mkdir()
    cases: list[tuple[str, dict, str]] = [
        ("empty.txt", {}, "empty"),
        ("bom.txt", {}, "empty"),
        ("one.txt", {}, "cannot be split"),
        ("latin.txt", {}, "not UTF-8 at byte 3"),
        ("folder", {}, "no file that ends in .txt, .md"),
        ("none.txt", {}, "no such file"),
        (book, {"val_fraction": 0.0}, "val_fraction"),
        (book, {"val_fraction": float("nan")}, "val_fraction"),
        (book, {"val_fraction": 1.0}, "val_fraction"),
        (book, {"tokenizer": "words"}, "tokenizer"),
        (book, {"tokenizer": "bpe", "vocab_size": 256}, "vocab_size"),
        (book, {"tokenizer": "byte", "vocab_size": 100}, "vocab_size"),
        (book, {"vocab_size": -1}, "vocab_size"),
    ]
    for name, more, message in cases:
        with pytest.raises(UserError, match=message):
            prepare((name,), Path("d"), **({"tokenizer": "byte"} | more))
        assert not Path("d").exists(), name
    Path("file").touch()
    for place in ("file", "file/d"):
        with pytest.raises(UserError, match="file"):
            prepare((book,), Path(place), "byte")


def test_token_files_are_not_overwritten_unasked(book: str) -> None:
    prepare((book,), Path("d"), "byte")
    before = state("d")
    with pytest.raises(UserError, match="--overwrite"):
        prepare((book,), Path("d"), "char")
    assert state("d") == before
    prepare((book,), Path("d"), "char", overwrite=True)
    assert load_tokenizer(Path("d/tokenizer.json")).kind == "char"
    Path("foreign").mkdir()
    Path("foreign/train.bin").write_bytes(b"\x01\x00" * 100)
    with pytest.raises(UserError, match=r"already holds train\.bin"):
        prepare((book,), Path("foreign"), "byte")
    with storage.locked(Path("d"), "x"), pytest.raises(UserError, match="in use"):
        prepare((book,), Path("d"), "byte", overwrite=True)


def test_ensure_reuses_a_preparation(book: str) -> None:
    def get(**more) -> Path:
        return ensure(from_settings({"text": book, "tokenizer": "char"} | more), offline=True)

    assert get() == Path("data/book-char")
    assert get(tokenizer="bpe", vocab_size=300) == Path("data/book-bpe300")
    before = state("data/book-char")
    assert get() == get(vocab_size=200) == Path("data/book-char")  # a size for the model
    assert state("data/book-char") == before
    os.utime(book, (1, 1))  # touched, and the same
    assert get() == Path("data/book-char")
    with pytest.raises(UserError, match="val_fraction"):
        get(val_fraction=0.2)
    with pytest.raises(UserError, match="tokenizer = char, not byte"):
        get(tokenizer="byte", data_dir="data/book-char")
    Path(book).write_text(TEXT + "more")
    with pytest.raises(UserError, match="before it changed"):
        get()
    assert get(data_dir="other") == Path("other")
    Path("foreign").mkdir()
    Path("foreign/train.bin").write_bytes(b"\x01\x00" * 100)
    with pytest.raises(UserError, match="another program"):
        get(data_dir="foreign")
    assert ensure(from_settings({"data_dir": "foreign"})) == Path("foreign")  # without a text: as it is
    for content in ("{}", "[]", '{"settings": 1, "source": 2}', '{"settings": {"tokenizer": 1}, "source": []}', "nope"):
        Path("other/meta.json").write_text(content)
        with pytest.raises(UserError, match="other"):
            get(data_dir="other")


def test_ensure_without_a_text(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOSSCURVE_CACHE", str(tmp_path / "none"))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    with pytest.raises(UserError, match=r"data_dir = there: no train\.bin"):
        ensure(from_settings({"data_dir": "there"}))
    assert not Path("there").exists()
    notices: list[str] = []
    assert ensure(from_settings({}), offline=True, say=notices.append) == Path("data")
    assert len(notices) == 1
    assert "come with Python" in notices[0]
    assert load_tokenizer(Path("data/tokenizer.json")).kind == "bpe"
    assert ensure(from_settings({}), offline=True, say=notices.append) == Path("data")
    assert len(notices) == 1
    with pytest.raises(UserError, match="holds bpe tokens, not char"):
        ensure(from_settings({"tokenizer": "char"}), offline=True)
    with pytest.raises(Failure, match="tiny Shakespeare"):
        ensure(from_settings({"text": "shakespeare"}), offline=True)
    assert not Path("data/shakespeare").exists()


def test_auto_falls_back_and_gpt2_is_strict(book: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LOSSCURVE_CACHE", str(tmp_path / "none"))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    notices: list[str] = []
    assert prepare((book,), Path("d"), offline=True, say=notices.append)["tokenizer"]["kind"] == "bpe"
    assert ["GPT-2's vocabulary" in line for line in notices] == [True, False]  # the other notice is about CRLF
    with pytest.raises(Failure, match="GPT-2's vocabulary"):
        prepare((book,), Path("e"), "gpt2", offline=True)
    assert not Path("e").exists()


# the command


def test_the_command(book: str, capsys, monkeypatch) -> None:
    assert run_command("prepare", [book, "--tokenizer", "byte", "--val-fraction=0.2", "--data-dir", "d"]) == 0
    out, err = capsys.readouterr()
    train = len(TEXT[: int(len(TEXT) * 0.8)].encode())
    assert f"byte tokens: train {train:,}, val {len(TEXT.encode()) - train:,}" in out
    assert "1.00 bytes per token; " in out
    assert f"suit {train / 20:.0f} parameters" in out or f"fit {train / 20:.0f} parameters" in out
    assert "next: losscurve train --data_dir d" in out
    notice = "note: book.txt: 40 CRLF line end(s)"
    assert err.startswith(notice)
    for argv, code in (
        ([book, "--data_dir", "d"], 2),
        ([book, "--data_dir", "d", "--tokenizer", "char", "--overwrite"], 0),
        (["--text", book, "--data_dir", "e", "--tokenizer", "byte"], 0),
        (["none.txt"], 2),
        ([book, "--tokeniser", "byte"], 2),
        ([book, "--tokenizer", "word"], 2),
        ([book, "--vocab_size", "x"], 2),
    ):
        assert run_command("prepare", argv) == code, argv
        err = capsys.readouterr().err
        assert err.startswith("error: " if code else notice)
        assert err.count("\n") <= 1
    monkeypatch.setenv("LOSSCURVE_CACHE", "none")
    assert run_command("prepare", ["shakespeare", "--offline", "--data_dir", "f"]) == 1
    assert not Path("f").exists()


# remedies work when pasted


def pasted(message: object) -> int:
    """Run the `losscurve prepare` command of a message and return its exit code."""
    words = shlex.split(str(message).partition("losscurve prepare ")[2])
    assert words
    return run_command("prepare", words)


def test_two_texts_with_the_same_name_are_distinguished(book: str) -> None:
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "t.txt").write_text(TEXT + folder)
    get = {"tokenizer": "byte"}
    assert ensure(from_settings(get | {"text": "a/t.txt"})) == Path("data/t-byte")
    with pytest.raises(UserError) as caught:
        ensure(from_settings(get | {"text": "b/t.txt"}))
    assert str(caught.value) == (
        "data/t-byte was made from another text, a/t.txt, and this is b/t.txt; give this one a folder of its own, with "
        "--data_dir data/b-t-byte"
    )
    assert ensure(from_settings(get | {"text": "b/t.txt", "data_dir": "data/b-t-byte"})) == Path("data/b-t-byte")
    assert ensure(from_settings(get | {"text": "./a/../a/t.txt"})) == Path("data/t-byte")
    with pytest.raises(UserError, match=r"made from another text, a/t.txt, and this is b/t.txt; choose another"):
        ensure(from_settings(get | {"text": "b/t.txt", "data_dir": "data/t-byte"}))


@pytest.mark.parametrize("name", ["book.txt", "my book's.txt", "-dash.txt"])
def test_the_command_that_prepares_again_is_whole(book: str, name: str) -> None:
    settings = {"text": name, "tokenizer": "bpe", "vocab_size": 300, "val_fraction": 0.2, "data_dir": "d 1"}
    config = from_settings(settings)
    Path(name).write_text(TEXT)
    ensure(config)
    Path(name).write_text(TEXT + "more")
    with pytest.raises(UserError, match="before it changed") as caught:
        ensure(config)
    assert pasted(caught.value) == 0
    meta = storage.read_json(Path("d 1/meta.json"))
    assert meta["settings"] | {"text": 0} == {"text": 0, "tokenizer": "bpe", "vocab_size": 300, "val_fraction": 0.2}
    assert ensure(config) == Path("d 1")
    with pytest.raises(UserError, match="val_fraction") as caught:
        ensure(from_settings({"val_fraction": 0.3}, config))
    assert pasted(caught.value) == 0
    Path("d 1/train.bin").unlink()
    with pytest.raises(UserError, match=r"has no train\.bin") as caught:
        ensure(config)
    assert pasted(caught.value) == 0


def test_the_command_that_prepares_a_folder_works(book: str, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"no train\.bin there") as caught:
        ensure(from_settings({"data_dir": "new place", "tokenizer": "byte"}))
    monkeypatch.setattr(corpus, "_shakespeare", lambda offline: corpus._file("book.txt", Path(book)))
    assert pasted(caught.value) == 0
    assert ensure(from_settings({"data_dir": "new place", "tokenizer": "byte"})) == Path("new place")
    Path("new place/train.bin").unlink()
    with pytest.raises(UserError, match=r"has no train\.bin") as caught:
        ensure(from_settings({"data_dir": "new place"}))
    assert pasted(caught.value) == 0
    assert load_tokenizer(Path("new place/tokenizer.json")).kind == "byte"


def test_the_recorded_vocab_size_of_a_run_matches_its_tokens(book: str) -> None:
    """The config.toml of a run records the size that was chosen."""
    config = from_settings({"text": book, "tokenizer": "bpe", "data_dir": "d"})
    size = prepare((book,), Path("d"), "bpe")["vocab_size"]
    assert ensure(from_settings({"vocab_size": size}, config)) == Path("d")
    with pytest.raises(UserError, match=f"vocab_size = None, not {size - 1}"):
        ensure(from_settings({"vocab_size": size - 1}, config))


# written JSON is bounded, because it is read again


def test_of_many_files_meta_names_the_first_and_sums_up_all(book: str, monkeypatch) -> None:
    monkeypatch.setattr(meta_json, "LISTED", 2)
    Path("t").mkdir()
    for name in "abcde":
        Path(f"t/{name}.txt").write_text(TEXT + name)
    config = from_settings({"text": "t", "tokenizer": "byte"})
    folder = ensure(config)
    source = storage.read_json(folder / "meta.json")["source"]
    assert [file["path"] for file in source["files"]] == ["t/a.txt", "t/b.txt"]
    assert (source["more"], len(source["stamps"])) == (3, 64)
    reading = []
    monkeypatch.setattr(reuse, "look", lambda *args: reading.append(1) or corpus.look(*args))
    assert ensure(config) == folder
    assert not reading  # the stamps of all files are equal
    os.utime("t/e.txt", (1, 1))
    assert ensure(config) == folder
    assert reading
    Path("t/e.txt").write_text(TEXT + "f")
    with pytest.raises(UserError, match="t before it changed"):
        ensure(config)
    Path("t/e.txt").unlink()
    with pytest.raises(UserError, match="t before it changed"):
        ensure(config)


def test_a_meta_of_an_older_version_with_all_files_is_read(book: str) -> None:
    Path("other.txt").write_text(TEXT)
    config = from_settings({"text": [book, "other.txt"], "tokenizer": "byte", "data_dir": "d"})
    folder = ensure(config)
    meta = storage.read_json(folder / "meta.json")
    for name in ("ends", "stamps", "more"):
        meta["source"].pop(name, None)
    storage.write_json(folder / "meta.json", meta)
    assert ensure(config) == folder
    os.utime("other.txt", (1, 1))
    assert ensure(config) == folder
    assert ensure(from_settings({"text": ["./other.txt", f"./{book}"]}, config)) == folder  # twice the same text
    Path("other.txt").write_text(TEXT[:-9])
    Path(book).write_text(TEXT + TEXT[-9:])
    with pytest.raises(UserError, match="before it changed"):
        ensure(config)


def test_unbounded_metadata_is_refused_before_writing(book: str, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"text: the names of its 2500 files take 9 MiB; put the files into a folder"):
        prepare(("x" * 4000,) * 2500, Path("d"), "byte")
    with pytest.raises(UserError, match="vocab_size = 1000001: a bpe has at most 1000000"):
        prepare((book,), Path("d"), "bpe", 1_000_001)
    monkeypatch.setattr(preparing, "MOST_SHARDS", 100)
    with pytest.raises(UserError, match=r"shard_tokens = 1: perhaps \d+ shards; give at least \d+") as caught:
        prepare((book,), Path("d"), "byte", shard_tokens=1)
    assert not Path("d").exists()
    enough = int(str(caught.value).split("at least ")[1])
    prepare((book,), Path("d"), "byte", shard_tokens=enough)
    assert 90 <= len(list(Path("d").glob("*.bin"))) <= 101


@needs_gpt2
def test_a_text_too_small_for_gpt2s_ids_gets_a_hint(book: str) -> None:
    notices: list[str] = []
    prepare((book,), Path("d"), say=notices.append, offline=True)  # few ids, each often
    Path("small.txt").write_text(" ".join(f"word{number} of many" for number in range(900)))
    prepare(("small.txt",), Path("e"), say=notices.append, offline=True)
    used = storage.read_json(Path("e/meta.json"))["vocab_used"]
    hints = [line for line in notices if "CRLF" not in line]
    assert hints == [
        f"small: its text uses {used} of 50,257 ids, each fewer than 10 times on average; a small vocabulary suits "
        "it better: --tokenizer bpe --vocab_size 512, or --tokenizer char"
    ]
    prepare(("small.txt",), Path("f"), "gpt2", say=notices.append, offline=True)  # GPT-2 was asked for: no hint
    prepare(("small.txt",), Path("g"), "bpe", 512, say=notices.append)
    assert [line for line in notices if "CRLF" not in line] == hints
