"""Tokenizers: against tiktoken and `tokenizers` themselves, round trips, cuts, hostile text and hostile files."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm import storage
from llm.errors import Failure, UserError
from llm.tokens import bpe, cut
from llm.tokens.bpe import BPE, gpt2, train_bpe
from llm.tokens.saved_tokenizer import load_tokenizer, save_tokenizer
from llm.tokens.tokenizer import Bytes, Characters

WORDS = "the king's crown, don't we'll 1234 Ünïcode 中文字。 naïve\n\n  x\t<|endoftext|> "
# fragments for every rule of the pre-tokenizer, and spaces on which Python and Rust differ
SHARDS = ["'s", "'ll", "'", "don", " ", "  ", "\n", "\r\n", "\t", "a", "Z9", "12", "½", "٣", "!", "...", "$", "_", "-"]
SHARDS += ["\x00", "\x1c", "\x1f", "\x85", "\xa0", "\u1680", "\u180e", "\u200b", "\u2028", "\u3000", "\ufeff"]
SHARDS += [
    "é",
    "e\u0301",
    "\u0301",
    "中",
    "ぁ",
    "한",
    "я",
    "、",
    "。",
    "🙂",
    "👩‍👩‍👧",
    "\U0001f1e9\U0001f1ea",
    "<|endoftext|>",
]
hostile = st.lists(st.sampled_from(SHARDS) | st.characters(exclude_categories=["Cs"]), max_size=60).map("".join)


def vocabulary() -> BPE | None:
    try:
        return gpt2(offline=True)
    except Failure:
        return None


GPT2 = vocabulary()
needs_gpt2 = pytest.mark.skipif(GPT2 is None, reason="GPT-2's vocabulary is not in LOSSCURVE_CACHE")


@pytest.fixture(scope="module")
def small() -> BPE:
    return train_bpe([WORDS * 50], 300)


@pytest.fixture(scope="module")
def reference():  # tiktoken's own GPT-2, read by tiktoken's own loader
    import tiktoken

    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(storage.cache_folder() / "tiktoken"))
    return tiktoken.get_encoding("gpt2")


@needs_gpt2
def test_gpt2_is_tiktokens(reference) -> None:
    ours = gpt2(offline=True)
    assert (ours.kind, ours.vocab_size, ours.end_of_text) == ("gpt2", 50257, 50256)
    assert ours.tokens == [reference.decode_single_token_bytes(i) for i in range(50257)]
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices([*SHARDS, "word", " word", "Word's"], k=200))
        assert ours.encode(text).tolist() == reference.encode_ordinary(text)


@needs_gpt2
@settings(deadline=None, max_examples=300)
@given(hostile)
@example("a\x1c b  \x85 \u3000c's ' s")
def test_slow_path_and_cuts_change_no_id(text: str) -> None:
    ours = GPT2
    whole = ours._encoding.encode_ordinary(text)
    assert np.concatenate(list(ours._encode_slowly(text))).tolist() == whole
    for size in (1, 2, 7):
        parts = list(cut.pieces([text[i : i + 3] for i in range(0, len(text), 3)], size))
        assert "".join(parts) == text
        assert [i for part in parts for i in ours._encoding.encode_ordinary(part)] == whole


@settings(deadline=None, max_examples=200)
@given(hostile)
def test_cuts_change_no_id_of_a_trained_bpe(text: str) -> None:
    whole = SMALL._encoding.encode_ordinary(text)
    assert SMALL.encode(text).tolist() == np.concatenate(list(SMALL._encode_slowly(text))).tolist() == whole
    assert [i for part in cut.pieces([text], 1) for i in SMALL.encode(part).tolist()] == whole
    assert SMALL.decode(whole) == text


SMALL = train_bpe([WORDS * 50], 300)


@settings(deadline=None, max_examples=200)
@given(hostile)
def test_round_trip(text: str) -> None:
    for each in (Bytes(), SMALL, Characters(text + "x")):
        ids = each.encode(text)
        assert each.decode(ids) == text
        assert each.decode_bytes(ids) == text.encode()
        assert ids.ndim == 1
        assert each.token_bytes()[ids].sum() == len(text.encode())
        assert each.end_of_text is None or each.end_of_text not in ids


def test_bpe_is_that_of_the_tokenizers_package() -> None:
    """The same merges, given to `tokenizers` as pairs in its own file format, give the same ids."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    rng = random.Random(1)
    text = "".join(rng.choices([*SHARDS, "word", " other", " wordy", "ab", "aab", "\n"], k=20000))
    ours = train_bpe([text], 1000)
    assert ours.vocab_size == 1000
    names = ours.to_json()["tokens"]
    known = set(names[:256])
    merges = []
    for name in names[256:]:  # the pair that merged into a token: the BPE of the token by smaller ids
        parts = list(name)
        rank = {n: i for i, n in enumerate(names)}
        while len(parts) > 2:
            pair = min(range(len(parts) - 1), key=lambda i: rank.get(parts[i] + parts[i + 1], 10**9))
            parts[pair : pair + 2] = [parts[pair] + parts[pair + 1]]
        merges.append(tuple(parts))
        known.add(name)
    theirs = tokenizers.Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    for _ in range(100):
        sample = "".join(rng.choices([*SHARDS[:24], "word", " other", " wordy", "ab", "aab"], k=100))
        assert ours.encode(sample).tolist() == theirs.encode(sample).ids


def test_long_runs_are_merged_exactly(small: BPE) -> None:
    """Merging window by window gives the ids of one merge over the whole."""
    rng = random.Random(2)
    tokens = [bytes([i]) for i in range(256)] + [b"ab", b"ba", b"aa", b"aaaa", b"abab", b"bb", b"aab", b"cab"]
    loops = BPE(tokens)
    for run in (
        b"a" * 200_001,
        b"ab" * 100_000,
        bytes(rng.choices(b"abc", k=300_000)),
        b"=" * 70_000,
        b"b" + b"a" * 131_071,
    ):
        for each in (loops, small):
            assert np.concatenate(list(each._merge_long(run))).tolist() == each._encoding._encode_single_piece(run)


@pytest.mark.parametrize("inside", range(60, 180, 7))
def test_windows_whose_end_changes_what_is_far_before(inside: int) -> None:
    """In this chain each pair merges before the one to its left, so the end of the chain decides all of its pairs."""
    chain = BPE([bytes([i]) for i in range(256)] + [bytes([i, i + 1]) for i in reversed(range(199))])
    run = b"\xff" * (2**16 - inside) + bytes(range(200)) + b"\xff"  # the first window ends inside the chain
    assert np.concatenate(list(chain._merge_long(run))).tolist() == chain._encoding._encode_single_piece(run)


def test_a_million_spaces(small: BPE) -> None:
    for space in (" ", "\n", " \n", "\u3000"):
        text = f"a{space * 10**6} b"
        ids = small.encode(text)
        assert small.decode(ids) == text
        # the closed form of the pre-tokenizer: all but the last space, then the last with the word
        expected = small._encoding._encode_single_piece(space * 10**6) + small.encode(" b").tolist()
        assert ids.tolist() == small.encode("a").tolist() + expected


@pytest.mark.parametrize("character", ["a", "=", "中", "\x1c", "\x00"])
def test_long_lines_without_a_cut(small: BPE, character: str) -> None:
    text = character * (5 * cut.PIECE)
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert ids.tolist() == small._encoding._encode_single_piece(text)


def test_a_stretch_too_long_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(cut, "UNCUT", 1000)
    with pytest.raises(UserError, match="1200 characters without a space"):
        list(cut.pieces(["a" * 600, "a" * 600]))
    assert len(list(cut.pieces(["a " * 600], 100))) > 1


def test_lone_surrogates_are_refused(small: BPE) -> None:
    for each in (Bytes(), small, Characters("ab")):
        with pytest.raises(UserError, match=r"U\+D83D, at position 2"):
            each.encode("ab\ud83d")


def test_characters() -> None:
    chars = Characters("hello\n")
    assert chars.characters == "\nehlo"
    assert chars.encode("hello").tolist() == [2, 1, 3, 3, 4]
    for unseen, name in (("z", "U\\+007A"), ("🙂", "U\\+1F642"), ("\x00", "U\\+0000")):
        with pytest.raises(UserError, match=f"{name}\\) is not in the vocabulary of 5 characters"):
            chars.encode(f"he{unseen}")


def test_ids_outside_the_vocabulary_are_decoded_as_unknown(small: BPE) -> None:
    assert Bytes().decode([104, 105, 999, -1]) == "hi\ufffd\ufffd"
    assert Bytes().decode([256]) == small.decode(np.array([small.end_of_text])) == "<|endoftext|>"
    assert Bytes().decode([0xC3]) == "\ufffd"


def test_bpe_sizes() -> None:
    assert train_bpe(["ab"], 4096).vocab_size < 300  # a small text has few merges
    assert train_bpe([WORDS * 9], 257).encode("ab").tolist() == [*map(SMALL.tokens.index, (b"a", b"b"))]
    with pytest.raises(UserError, match="vocab_size = 256"):
        train_bpe(["ab"], 256)
    again = train_bpe([WORDS * 50], 300)
    assert again.tokens == SMALL.tokens


def test_saved_and_loaded(tmp_path: Path, small: BPE) -> None:
    for each in (Bytes(), small, Characters('a"\\\n🙂\x00\u2028')):
        save_tokenizer(each, tmp_path / "tokenizer.json")
        loaded = load_tokenizer(tmp_path / "tokenizer.json")
        assert loaded.to_json() == each.to_json()
        assert loaded.encode('a"').tolist() == each.encode('a"').tolist()
        assert (loaded.kind, loaded.vocab_size, loaded.end_of_text) == (each.kind, each.vocab_size, each.end_of_text)


@needs_gpt2
def test_a_saved_gpt2_needs_no_cache(tmp_path: Path, monkeypatch) -> None:
    save_tokenizer(GPT2, tmp_path / "tokenizer.json")
    monkeypatch.setenv("LOSSCURVE_CACHE", str(tmp_path / "none"))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    assert load_tokenizer(tmp_path / "tokenizer.json").encode(WORDS).tolist() == GPT2.encode(WORDS).tolist()
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["tokens"][300], saved["tokens"][301] = saved["tokens"][301], saved["tokens"][300]
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="not those of GPT-2"):
        load_tokenizer(tmp_path / "tokenizer.json")


BAD = [
    "",
    "[]",
    "null",
    "{}",
    '{"kind": "gpt2"}',
    '{"kind": ["bpe"]}',
    '{"kind": "byte", "vocab_size": 256}',
    "[" * 99999,
]
BAD += [
    '{"kind": "char", "vocab_size": 2, "characters": "ba"}',
    '{"kind": "char", "vocab_size": 1, "characters": "\\ud800"}',
]
BAD += [
    '{"kind": "char", "vocab_size": 0, "characters": ""}',
    '{"kind": "char", "characters": [1]}',
    '{"kind": "char"}',
]
BAD += [
    '{"kind": "bpe", "vocab_size": 2, "tokens": ["a"]}',
    '{"kind": "bpe", "tokens": [""]}',
    '{"kind": "bpe", "tokens": 7}',
]
BAD += ['{"kind": "bpe", "tokens": ["\\u4e2d"]}', '{"kind": "byte", "vocab_size": ' + "9" * 5000 + "}", "\xff", "{}{}"]


@pytest.mark.parametrize("content", BAD, ids=range(len(BAD)))
def test_hostile_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content.encode("latin-1") if content == "\xff" else content.encode())
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(path)
    with pytest.raises(UserError, match="absent"):
        load_tokenizer(tmp_path / "absent")


@settings(deadline=None, max_examples=150)
@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), lambda x: st.lists(x, max_size=3)),
    st.data(),
)
def test_mangled_files_are_refused_or_load(value: object, data) -> None:
    import tempfile

    saved = data.draw(st.sampled_from([SMALL.to_json(), Bytes().to_json(), Characters("abc").to_json()]))
    saved = saved | {data.draw(st.sampled_from(sorted(saved))): value}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.json")
        path.write_text(json.dumps(saved))
        try:
            load_tokenizer(path)
        except UserError as error:
            assert "tokenizer.json" in str(error)  # noqa: PT017


def test_gpt2_without_a_network_fails_clearly(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LOSSCURVE_CACHE", str(tmp_path))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr(bpe, "VOCAB_URL", "http://127.0.0.1:9/vocab.bpe")
    with pytest.raises(Failure, match=r"GPT-2.s vocabulary: .*cannot be reached"):
        gpt2()
    with pytest.raises(Failure, match="--offline"):
        gpt2(offline=True)
    assert not list(tmp_path.iterdir())  # nothing broken is left in the cache


@needs_gpt2
def test_gpt2_honours_tiktokens_own_cache(tmp_path: Path, monkeypatch) -> None:
    name = next((storage.cache_folder() / "tiktoken").glob("6d1c*"))
    (tmp_path / name.name).write_bytes(name.read_bytes())
    monkeypatch.setenv("LOSSCURVE_CACHE", str(tmp_path / "none"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert gpt2(offline=True).vocab_size == 50257
    (tmp_path / name.name).write_bytes(name.read_bytes()[:-1])
    with pytest.raises(Failure, match="is damaged"):
        gpt2(offline=True)
