"""A file that is not UTF-8 text is named by its format before anything is written, with a command that converts it."""

import bz2
import gzip
import io
import lzma
import pickle
import random
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
from conftest import flags

from llm.config import from_settings, read_toml
from llm.errors import UserError
from llm.plan.text_size import text_of
from llm.text.corpus import opened

ENGLISH = "The café said “naïve” — it’s déjà vu.\nAnother line of text here, with façade.\n" * 40
GERMAN = "Größe und Straße über Öl.\nÄpfel müssen schön sein für den König.\n" * 40
RUSSIAN = "Привет, мир! Это русский текст о войне и мире.\nЕщё одна строка текста.\n" * 40
CHINESE = "中文文本，这是一个测试。\n我们在这里写一些句子。\n" * 40
JAPANESE = "日本語のテキストです。\nここに文章があります。カタカナ。\n" * 40
POLISH = "Zażółć gęślą jaźń, wieś źdźbło.\nLitwo! Ojczyzno moja, ty jesteś jak zdrowie.\n" * 40


def refused(losscurve, name: str) -> str:
    """Return the error of `prepare` for a text that it refuses, and check that nothing is written."""
    code, out, err = losscurve(f"prepare {name} --tokenizer byte --data_dir made")
    assert code == 2, err
    assert err.startswith(f"error: {name}: ")
    assert err.count("\n") == 1
    assert not out
    assert not Path("made").exists()
    return err.strip()


def converted(err: str, filter: str) -> str:
    """Run the command at the end of a message, which uses `filter`, and return the text of the file that it writes."""
    if not shutil.which(filter.split()[0]):
        pytest.skip(f"{filter.split()[0]} is not installed")
    command = err.rpartition(": ")[2]
    assert filter in command
    subprocess.run(["bash", "-c", command], check=True)
    target = command.rpartition("> ")[2].strip("'")
    with opened((target,)) as source:
        return "".join(source.files[0].read())


@pytest.mark.parametrize("name", ["a.txt", "-a b.md", "a.txt.gz", "a.jsonl"])
@pytest.mark.parametrize(
    ("text", "encoding", "named"),
    [
        (ENGLISH, "utf-16", "UTF-16"),
        (ENGLISH, "utf-16-le", "UTF-16LE"),
        (RUSSIAN, "utf-16-be", "UTF-16BE"),
        (CHINESE, "utf-16-le", "UTF-16LE"),
        (CHINESE, "utf-16-be", "UTF-16BE"),
        (ENGLISH, "utf-32", "UTF-32"),
        (ENGLISH, "utf-32-be", "UTF-32BE"),
        (ENGLISH, "cp1252", "WINDOWS-1252"),
        (GERMAN, "latin1", "LATIN1"),
    ],
)
def test_a_certain_encoding_is_named_and_converted(here, name, text, encoding, named):
    if name == "a.jsonl":
        text = "".join(f'{{"text": "{line}"}}\n' for line in text.splitlines())
    content = text.encode(encoding)
    Path(name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(UserError) as caught, opened((name,)) as source:
        list(source.files[0].read())
    found = converted(str(caught.value), f"iconv -f {named} -t UTF-8")
    assert found == (text if name != "a.jsonl" else "".join(line[10:-2] for line in text.splitlines()))


@pytest.mark.parametrize(
    ("text", "encoding", "named"),
    [
        (RUSSIAN, "cp1251", "CP1251"),
        (RUSSIAN, "koi8-r", "KOI8-R"),
        (CHINESE, "gbk", "GB18030"),
        (CHINESE.replace("这", "是").replace("写", "在").replace("测试", "文本"), "gbk", "GB18030"),
        (JAPANESE, "shift_jis", "SHIFT_JIS"),
        (JAPANESE, "euc-jp", "EUC-JP"),
        (POLISH, "cp1250", "CP1250"),
        (GERMAN, "cp850", "CP850"),
    ],
)
def test_an_uncertain_encoding_is_not_guessed_but_excerpted(here, losscurve, text, encoding, named):
    Path("a.txt").write_bytes(text.encode(encoding))
    err = refused(losscurve, "a.txt")
    place = next(place for place, byte in enumerate(text.encode(encoding)) if byte >= 0x80)
    assert f"not UTF-8 at byte {place} (line 1): byte 0x{text.encode(encoding)[place]:02X}" in err
    assert f"{text[:8]}" in err.partition(f"' as {named}")[0].rpartition(" '")[2]
    assert converted(err.replace("-f ENCODING", f"-f {named}"), f"iconv -f {named}") == text


PACKED = {"gzip -dc": gzip.compress, "xz -dc": lzma.compress, "bzip2 -dc": bz2.compress}


@pytest.mark.parametrize("command", PACKED)
@pytest.mark.parametrize("name", ["a.txt", "it's.txt.xz", "a"])
def test_a_compressed_text_is_unpacked(here, command, name):
    Path(name).write_bytes(PACKED[command](ENGLISH.encode()))
    with pytest.raises(UserError, match="compressed by") as caught, opened((name,)) as source:
        list(source.files[0].read())
    if "'" in name:
        assert "'it'\"'\"'s.txt.xz'" in str(caught.value)
    else:
        assert converted(str(caught.value), command) == ENGLISH


def zipped(*names: str) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name in names:
            archive.writestr(name, "application/epub+zip" if name == "mimetype" else "x")
    return made.getvalue()


FORMATS = {
    b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n": "a PDF, not plain text; convert it: pdftotext - - < a.x > a.utf8.txt",
    zipped("[Content_Types].xml", "word/document.xml"): "pandoc -f docx -t plain < a.x > a.utf8.txt",
    zipped("mimetype", "content.opf"): "pandoc -f epub -t plain < a.x > a.utf8.txt",
    zipped("a.txt"): "unzip a.x -d a-unpacked",
    zipped("archive/data.pkl"): "model weights (PyTorch)",
    b"{\\rtf1\\ansi": "pandoc -f rtf -t plain < a.x",
    b"\x89PNG\r\n\x1a\n\0": "a picture (PNG)",
    b"\xff\xd8\xff\xe0": "a picture (JPEG)",
    b"\x7fELF\2\1": "a program (ELF)",
    b"SQLite format 3\0": "an SQLite database",
    b"PAR1\x15\0": "mv a.x a.x.parquet",
    b"GGUF\3\0": "model weights (GGUF)",
    b'\x50\0\0\0\0\0\0\0{"a": {}}': "model weights (safetensors)",
    pickle.dumps({"a": 1}): "a Python pickle",
    b"x" * 257 + b"ustar\x0000": "mkdir a-unpacked && tar -xf a.x -C a-unpacked",
    b"a\0b" * 100: "binary data, not text (100 of its first 300 bytes are NUL)",
    bytes(range(1, 256)) * 9: "binary data, not text",
}


@pytest.mark.parametrize("content", FORMATS, ids=range(len(FORMATS)))
def test_a_file_that_is_no_text_is_named(here, losscurve, content):
    Path("a.x").write_bytes(content)
    assert FORMATS[content] in refused(losscurve, "a.x")


@pytest.mark.parametrize(
    "begin", ["PAR1 is magic. ", "GIF89a and GGUF. ", "x" * 256 + "mustard ", "BZh, PK, 7z, Rar! "]
)
def test_a_text_that_begins_like_a_format_is_a_text(here, begin):
    Path("a.txt").write_text(begin + ENGLISH, encoding="utf-8")
    with opened(("a.txt",)) as source:
        assert "".join(source.files[0].read()) == begin + ENGLISH


def test_token_files_are_named(here, losscurve):
    assert losscurve("prepare text.txt --tokenizer char --data_dir data")[0] == 0
    err = refused(losscurve, "data/train.bin")
    assert err == "error: data/train.bin: token ids, not text; train on their folder with --data_dir data"


@pytest.mark.parametrize("slip", [ENGLISH.encode("cp1252"), b"caf\xe9 here\n" + ENGLISH.encode()])
def test_the_place_where_another_encoding_begins_is_named(here, losscurve, slip):
    """Also beyond HEAD. LATIN1 is not suggested: it would garble the part that is UTF-8."""
    before = ENGLISH.encode() * 400
    Path("a.txt").write_bytes(before + slip)
    err = refused(losscurve, "a.txt")
    place = slip.index(b"\xe9")
    line = before.count(b"\n") + 1
    assert f"not UTF-8 at byte {len(before) + place} (line {line}): UTF-8 before and another encoding from there" in err
    assert converted(err, "iconv -c").startswith(ENGLISH * 400 + slip[:place].decode())


def test_a_truncated_text_is_distinguished_from_another_encoding(here, losscurve):
    Path("a.txt").write_bytes(RUSSIAN.encode()[:-2])
    assert losscurve("prepare a.txt --tokenizer byte --data_dir made")[0] == 0  # "\n" and a whole character are gone
    shutil.rmtree("made")
    Path("a.txt").write_bytes(RUSSIAN.encode()[:-3])
    err = refused(losscurve, "a.txt")
    assert "cut off in the middle of a character" in err
    assert converted(err, "head -c") == RUSSIAN[:-3]


@pytest.mark.parametrize("command", ["prepare - --data_dir made", "train --text - --data_dir made"])
def test_standard_input_is_checked_the_same_way(here, monkeypatch, losscurve, command):
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(ENGLISH.encode("utf-16-le"))))
    code, _, err = losscurve(f"{command} --tokenizer byte")
    assert code == 2
    assert err.endswith("convert it: … | iconv -f UTF-16LE -t UTF-8 | losscurve …\n")
    assert not Path("made").exists()


def test_plan_checks_the_same_way(here, losscurve):
    Path("a.txt").write_bytes(ENGLISH.encode("utf-16-le"))
    code, _, err = losscurve("plan --text a.txt")
    assert code == 2
    assert "iconv -f UTF-16LE" in err


def test_compressed_texts_and_rows_are_read(here, losscurve):
    zstd = pytest.importorskip("backports.zstd")
    rows = "".join(f'{{"text": "{line}"}}\n' for line in ENGLISH.splitlines())
    for name, content in (("a.txt", ENGLISH), ("b.md", ENGLISH), ("c.jsonl", rows), ("d.ndjson", rows)):
        raw = ("\ufeff" + content).encode()
        for suffix, compress in (("", bytes), (".gz", gzip.compress), (".zst", zstd.compress)):
            Path(name + suffix).write_bytes(compress(raw))
        with opened((name, f"{name}.gz", f"{name}.zst")) as source:
            plain, *packed = [list(file.read()) for file in source.files]
        assert packed == [plain, plain]
        assert "\ufeff" not in "".join(plain)
        sizes = {text_of(from_settings({"text": name + s, "tokenizer": "byte"})).tokens for s in ("", ".gz", ".zst")}
        assert max(sizes) - min(sizes) <= 3, "the byte-order mark, and no more"
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"size"  # as pzstd begins a file
    Path("e.txt.zst").write_bytes(skipped + zstd.compress(ENGLISH.encode()))
    with opened(("e.txt.zst",)) as source:
        assert "".join(source.files[0].read()) == ENGLISH
    Path("e.txt").write_bytes(Path("e.txt.zst").read_bytes())
    assert "compressed by Zstandard" in refused(losscurve, "e.txt")
    for suffix, compress in ((".gz", gzip.compress), (".zst", zstd.compress)):
        for name in ("cut.txt", "cut.jsonl"):  # truncated
            Path(name + suffix).write_bytes(compress(rows.encode())[:-6])
            assert "damaged or was cut off" in refused(losscurve, name + suffix)
        Path("plain.txt" + suffix).write_bytes(ENGLISH.encode())
        err = refused(losscurve, "plain.txt" + suffix)
        assert err.endswith(f"rename it: mv -n plain.txt{suffix} plain.txt")


def test_a_large_compressed_text_is_estimated_for_a_plan(here, monkeypatch):
    monkeypatch.setattr("llm.text.rows.SAMPLE", 10**5)
    monkeypatch.setattr("llm.text.recognise.HEAD", 10**4)
    text = random.Random(0).randbytes(1_000_000).hex()
    Path("a.txt.gz").write_bytes(gzip.compress(text.encode()))
    found = text_of(from_settings({"text": "a.txt.gz", "tokenizer": "byte"})).unprepared
    assert found == pytest.approx(len(text), rel=0.1)


def test_a_missing_zstandard_package_is_named(here, monkeypatch, losscurve):
    Path("a.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    monkeypatch.setitem(sys.modules, "backports", None)
    err = refused(losscurve, "a.txt.zst")
    assert err == (
        "error: a.txt.zst: Zstandard needs the backports.zstd package; install it with: pip install backports.zstd"
    )


def test_a_byte_order_mark_is_dropped_from_prompts_and_presets(here, losscurve):
    assert losscurve(f"train --text text.txt {flags(max_steps=3, eval_every=3)}")[0] == 0
    text = Path("text.txt").read_text(encoding="utf-8")[:9]
    Path("p.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    code, out, err = losscurve("sample --prompt_file p.txt --max_new_tokens 3")
    assert (code, out[:9], err) == (0, text, "")
    Path("p.txt").write_bytes(text.encode("utf-16"))
    code, _, err = losscurve("sample --prompt_file p.txt --max_new_tokens 3")
    assert code == 2
    assert err.startswith("error: prompt_file p.txt: text in UTF-16")
    assert converted(err.strip(), "iconv -f UTF-16 -t UTF-8") == text
    Path("a.toml").write_bytes(b"\xef\xbb\xbfmax_steps = 7\n")
    assert read_toml("a.toml") == {"max_steps": 7}
