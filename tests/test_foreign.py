"""Token files of other programs: read in their format, or refused by name with a command that converts them."""

import contextlib
import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from conftest import flags, run_python, words

from llm.checks.verify import verify
from llm.config import from_settings
from llm.data import open_data
from llm.errors import UserError
from llm.plan import text_size
from llm.run import Run
from llm.tokens.foreign import characters, check_format
from llm.tokens.token_files import GPT2_VOCAB

TEXT = words(900)
ALPHABET = sorted(set(TEXT))
IDS = np.array([ALPHABET.index(character) for character in TEXT])
# ids with the frequencies of a text: small ones are common, and some are near the end of GPT-2's vocabulary
GPT2_IDS = np.minimum(np.random.default_rng(0).zipf(1.15, 3000), 10**9) % GPT2_VOCAB
SIZES = {"n_layer": 1, "n_head": 1, "n_embd": 8, "max_steps": 2, "warmup_steps": 0, "tokenizer": "auto"}


def llm_c(ids, dtype="<u2", magic=20240520):
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, len(ids)
    return header.tobytes() + ids.astype(dtype).tobytes()


def numpy_file(ids):
    np.save("row.npy", ids.astype(np.int64))
    return Path("row.npy").read_bytes()


def write(folder, ids, convert):
    Path(folder).mkdir(parents=True)
    for name, part in (("train", ids[:-300]), ("val", ids[-300:])):
        Path(folder, f"{name}.bin").write_bytes(convert(part))
    return Path(folder)


def uint16(ids):
    return ids.astype("<u2").tobytes()


def nanogpt(folder="nano", **changes):
    write(folder, IDS, uint16)
    size = len(ALPHABET)
    meta = {"vocab_size": size, "itos": dict(enumerate(ALPHABET)), "stoi": {c: i for i, c in enumerate(ALPHABET)}}
    Path(folder, "meta.pkl").write_bytes(pickle.dumps(meta | changes))
    return Path(folder)


def refusal(folder, **settings):
    with pytest.raises(UserError) as caught:
        open_data(Path(folder), 16, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# nanoGPT's character data.


def test_nanogpts_characters_are_read_as_such(here, losscurve):
    nanogpt()
    code, _, err = losscurve("train --data_dir nano " + flags(**SIZES))
    assert code == 0
    assert f"by its meta.pkl the ids are {len(ALPHABET)} characters" in err
    run = Run.open("checkpoints")
    assert run.config.model.vocab_size == len(ALPHABET)
    assert run.tokenizer.to_json()["characters"] == "".join(ALPHABET)
    assert run.tokenizer.decode(open_data(Path("nano"), 16).val[:50]) == TEXT[-300:-250]
    assert run.record[-1]["bits_per_byte"] is not None
    assert text_size.text_of(from_settings({"data_dir": "nano"})).vocabulary == len(ALPHABET)
    code, out, _ = losscurve("show-batch --step 1")
    assert code == 0
    assert out.splitlines()[1] in TEXT or out.splitlines()[1] + "\n" in TEXT
    assert losscurve("train --resume --max_steps 3")[0] == 0
    assert losscurve("sample --max_new_tokens 5")[0] == 0


def test_nanogpts_characters_are_characters_for_a_preset_too(here, losscurve):
    nanogpt()
    assert losscurve("train --data_dir nano " + flags(**SIZES | {"tokenizer": "char"}))[0] == 0
    code, _, err = losscurve("train --out_dir x --data_dir nano " + flags(**SIZES | {"tokenizer": "gpt2"}))
    assert (code, "nano holds char tokens, not gpt2" in err) == (2, True)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_pickles_of_all_ages(here, protocol):
    meta = {"vocab_size": 300, "itos": {i: chr(i + 200) for i in range(300)}, "stoi": {}}
    Path("meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    assert characters(Path()).vocab_size == 300


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (pickle.dumps({"vocab_size": 1, "itos": {0: "a"}, "x": Bomb()}), "is a pickle with more than plain data in it"),
        (b"cos\nmkdir\n(S'ran'\ntR.", "more than plain data in it (GLOBAL)"),
        (pickle.dumps({0: (1, 2)}), "more than plain data in it"),  # nested tuples as keys would take forever
        (pickle.dumps({"itos": {0: "a"}})[:-4], "so it is not read"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "asks for more memory"),
        (b"\x80\x02h\x05.", "is a damaged pickle"),
        (b"", "so it is not read"),
        (b"a text", "so it is not read"),
        (pickle.dumps("x" * 2**22), "has more than 4 MiB"),
        (pickle.dumps([1]), "has no itos"),
        (pickle.dumps({"vocab_size": 2, "itos": {0: "a", 1: "the"}}), "has no itos of one character an id"),
        (pickle.dumps({"vocab_size": 2, "itos": {0: "b", 1: "a"}}), "not numbered in the order of their code points"),
        (pickle.dumps({"vocab_size": 2, "itos": {0: "a", 2: "b"}}), "not numbered in the order"),
        (pickle.dumps({"vocab_size": 3, "itos": {0: "a", 1: "b"}}), "not numbered in the order"),
    ],
)
def test_a_meta_that_is_not_nanogpts_is_refused_and_runs_no_code(here, content, cause):
    folder = nanogpt()
    (folder / "meta.pkl").write_bytes(content)
    message = refusal(folder)
    assert message.startswith(f"{folder / 'meta.pkl'}: ")
    assert cause in message
    assert next((finding.path.name, finding.good) for finding in verify(folder)) == ("meta.pkl", False)
    assert not Path("ran").exists()
    (folder / "meta.pkl").rename(folder / "away.pkl")  # what the message says to do
    assert open_data(folder, 16, len(ALPHABET)).vocab_size == len(ALPHABET)


def test_no_damage_to_a_meta_does_more_than_refuse(here):
    folder = nanogpt()
    content = (folder / "meta.pkl").read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[draw.integers(len(content))] ^= 1 << draw.integers(8)
        (folder / "meta.pkl").write_bytes(damaged)
        with contextlib.suppress(UserError):
            characters(folder)


def test_the_meta_of_other_data(here):
    folder = nanogpt()
    ids = IDS.copy()
    ids[5] = len(ALPHABET)
    ids.astype("<u2").tofile(folder / "train.bin")
    message = refusal(folder)
    assert f"token 5 has id {len(ALPHABET)}, and the vocabulary has {len(ALPHABET)}" in message
    assert "vocab_size" not in message  # a larger one would not help
    assert f"is below the {len(ALPHABET)} of {folder / 'meta.pkl'}" in refusal(folder, vocab_size=3)


def test_characters_without_their_meta_are_not_gpt2s(here):
    folder = write("d", IDS, uint16)
    message = refusal(folder)
    largest = len(ALPHABET) - 1
    assert f"the largest id is {largest}, so these are characters or bytes and not GPT-2's tokens" in message
    assert f"--vocab_size {largest + 1} " in message
    with pytest.raises(UserError, match="the largest id is"):
        text_size.text_of(from_settings({"data_dir": "d"}))
    assert open_data(folder, 16, largest + 1).vocab_size == largest + 1


# Ids in other formats.


FORMATS = {
    "uint32 ids": lambda ids: ids.astype("<u4").tobytes(),
    "big-endian uint32 ids": lambda ids: ids.astype(">u4").tobytes(),
    "int64 ids": lambda ids: ids.astype("<i8").tobytes(),
    "big-endian int64 ids": lambda ids: ids.astype(">i8").tobytes(),
    "float32 ids": lambda ids: ids.astype("<f4").tobytes(),
    "float64 ids": lambda ids: ids.astype("<f8").tobytes(),
    "big-endian uint16 ids": lambda ids: ids.astype(">u2").tobytes(),
    "llm.c's header of 256 int32": llm_c,
    "a NumPy file (.npy)": numpy_file,
}


@pytest.mark.parametrize("ids", [GPT2_IDS, IDS], ids=["tokens", "characters"])
@pytest.mark.parametrize("words", FORMATS)
def test_ids_in_another_format_are_refused_with_a_command_that_converts_them(here, words, ids):
    folder = write("a folder/data", ids, FORMATS[words])
    if ids is IDS:
        (folder / "meta.pkl").write_bytes((nanogpt() / "meta.pkl").read_bytes())
    for message in (refusal(folder), refusal(folder, vocab_size=65536)):
        assert message.startswith(f"{folder / 'train.bin'}: ")
        assert f" {words}" in message.partition(", and without")[0]
        assert "a larger" not in message
    with pytest.raises(UserError, match="only bare uint16 ids"):
        text_size.text_of(from_settings({"data_dir": str(folder)}))
    assert [finding.good for finding in verify(folder) if finding.path.suffix == ".bin"] == [False, False]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for _ in range(2):  # again, it does the same
        run_python(message.partition("converting them with: ")[2])
        data = open_data(folder / "uint16", 16)
        assert data.train.tolist() == ids[:-300].tolist()
        assert data.val.tolist() == ids[-300:].tolist()
        assert data.vocab_size == (GPT2_VOCAB if ids is GPT2_IDS else len(ALPHABET))
    assert all(path.read_bytes() == content for path, content in before.items())


def test_bytes_of_ids(here):
    folder = write("d", IDS, lambda ids: ids.astype("u1").tobytes())
    assert "looks like uint8 ids" in refusal(folder)
    assert "np.fromfile" in refusal(folder)


def test_only_the_file_that_needs_it_is_converted(here):
    folder = write("d", GPT2_IDS, uint16)
    GPT2_IDS[-300:].astype("<u4").tofile(folder / "val.bin")
    message = refusal(folder)
    assert message.startswith(f"{folder / 'val.bin'}: looks like uint32 ids")
    assert "[('train.bin', '<u2', 0), ('val.bin', '<u4', 0)]" in message


def test_ids_that_do_not_fit_get_no_command(here):
    ids = np.where(GPT2_IDS == 1, 128_000, GPT2_IDS)
    for convert in (FORMATS["uint32 ids"], lambda ids: llm_c(ids, "<u4", 20240801)):
        folder = write(f"d{convert is llm_c}{len(os.listdir())}", ids, convert)
        message = refusal(folder)
        assert "the ids of train.bin, from " in message
        assert "to 128000, do not fit into uint16" in message
        assert "python -c" not in message


def test_a_table_of_numbers_is_no_row_of_ids(here):
    folder = write("d", GPT2_IDS, uint16)
    for array in (np.zeros((500, 3), np.int64), np.zeros(500)):
        np.save("a.npy", array)
        Path("a.npy").rename(folder / "train.bin")
        assert "is a NumPy file (.npy), but not a one-dimensional array of integers" in refusal(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (TEXT.encode(), "is a text, not token ids"),
        ("Съешь же ещё этих мягких французских булок. ".encode() * 90, "is a text"),
        ("Voilà une bien étrange façon d'être là. ".encode("latin-1") * 90 + b"x", "is a text"),
        (gzip.compress(TEXT.encode()), "is a gzip file; unpack it first"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "is a Git LFS pointer"),
        (b"\n<!DOCTYPE html>\n<html><body>Not found" + b" " * 400, "is a web page"),
    ],
)
def test_what_holds_no_ids_is_named(here, content, words):
    folder = write("d", GPT2_IDS, uint16)
    (folder / "train.bin").write_bytes(content)
    for vocab_size in (None, 65536):
        assert words in refusal(folder, vocab_size=vocab_size)
    assert words in next(finding.message for finding in verify(folder) if finding.good is False)


def test_a_text_that_is_called_train_bin_can_be_trained_on_as_the_message_says(here, losscurve):
    folder = write("d", GPT2_IDS, uint16)
    (folder / "train.bin").write_text(TEXT)
    command = refusal(folder).partition("losscurve ")[2]
    assert losscurve(command + " " + flags(**SIZES | {"tokenizer": "char"}))[0] == 0


def draws():
    """Ids as programs write them, in bare uint16."""
    draw = np.random.default_rng(1)
    yield GPT2_IDS, None
    yield draw.integers(0, GPT2_VOCAB, 5000), None
    yield draw.integers(0, 65529, 5000), 65529  # RWKV's
    yield np.minimum(draw.zipf(1.3, 5000), 31_999), 32_000
    yield np.frombuffer(TEXT.encode(), np.uint8), 257
    yield np.append(np.frombuffer(TEXT.encode(), np.uint8), [256] * 20), 257  # ours, with end-of-text
    yield draw.integers(0, 20, 5000), 20
    yield draw.integers(0, 2, 5000), 2
    yield np.zeros(5000, int), 1
    yield np.arange(5000), None
    yield np.full(5000, 300), None
    yield np.minimum(draw.zipf(3, 5000), 4), 5  # the bases of a genome


@pytest.mark.parametrize(("ids", "vocab_size"), list(draws()))
def test_bare_ids_are_taken_for_nothing_else(here, ids, vocab_size):
    folder = write("d", ids, uint16)
    assert open_data(folder, 16, vocab_size).train.tolist() == ids[:-300].tolist()


def test_an_id_beyond_the_vocabulary_gets_a_size_that_works(here):
    ids = GPT2_IDS.copy()
    ids[7], ids[9] = 60_000, 61_000
    folder = write("d", ids, uint16)
    message = refusal(folder)
    assert "token 7 has id 60000, and the vocabulary has 50257; give --vocab_size 61001 if its" in message
    assert open_data(folder, 16, 61_001).vocab_size == 61_001


def test_ids_with_a_meta_json_are_what_that_says(here, losscurve):
    assert losscurve("prepare text.txt --tokenizer byte --data_dir d")[0] == 0
    content = Path("d/train.bin").read_bytes()
    Path("d/meta.pkl").write_bytes(pickle.dumps(Bomb()))
    assert open_data(Path("d"), 16).vocab_size == 257
    assert Path("d/train.bin").read_bytes() == content
    with pytest.raises(UserError):
        check_format(Path("text.txt"))
