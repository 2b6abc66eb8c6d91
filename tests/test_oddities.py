"""Unexpected contents of a text are reported in one line each and change no byte; rows with another field."""

import gzip
import hashlib
import io
import json
import subprocess
import types
from pathlib import Path

import pytest
from conftest import flags

from llm.config import from_settings, to_settings
from llm.errors import UserError
from llm.plan.text_size import text_of
from llm.prepare.prepare import prepare
from llm.prepare.reuse import ensure
from llm.text import text_file
from llm.text.corpus import look, opened


def noticed(*text: str, **more) -> list[str]:
    with opened(text, **more) as source:
        return look(source).notices


@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_marks_are_counted_and_kept(here, monkeypatch, chunk):
    monkeypatch.setattr(text_file, "CHUNK", chunk)
    text = "one\r\ntwo\r\n<|endoftext|>\r\nthree\ufeff" + "x" * 1500 + "\0 <|endoftext|><|endoftext|> <|endoftext"
    Path("a.txt").write_bytes(text.encode())
    Path("b.txt").write_text("plain\r text, no line end of Windows\n", encoding="utf-8")
    Path("c.txt").write_bytes(b"\xef\xbb\xbfa\r\n")
    assert noticed("b.txt") == []
    assert noticed("c.txt", "a.txt") == [
        "c.txt and 1 more file(s): 4 CRLF line end(s), as Windows writes them: kept as they are; to remove them: "
        "tr -d '\\r' < c.txt > c.utf8.txt",
        "a.txt: 1 byte-order mark(s) inside the text: kept as they are; to remove them: "
        "perl -pe 's/\\xEF\\xBB\\xBF//g' < a.txt > a.utf8.txt",
        "a.txt: 1 NUL character(s): kept as they are; to remove them: tr -d '\\000' < a.txt > a.utf8.txt",
        "a.txt: 3 times <|endoftext|>: ordinary text, not the token; to put the token between documents, give each its "
        "own file or row",
    ]
    with opened(("a.txt",)) as source:
        assert look(source).sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_the_commands_remove_the_marks(here):
    Path("a b.txt").write_bytes(("one\r\ntwo\ufeff\n" + "x" * 1500 + "\0").encode())
    for what in ("CRLF", "byte-order", "NUL"):
        command = next(line for line in noticed("a b.txt") if what in line).rpartition(": ")[2]
        subprocess.run(["bash", "-c", command], check=True)
        left = noticed("a b.utf8.txt")
        assert len(left) == 2
        assert not any(what in line for line in left)


def test_each_file_loses_its_byte_order_mark_in_joined_texts(here, monkeypatch):
    mark = b"\xef\xbb\xbf"
    Path("a.txt").write_bytes(mark + b"a\n")
    Path("b.md.gz").write_bytes(gzip.compress(mark + b"b\n"))
    Path("c.jsonl").write_bytes(mark + b'{"text": "c\\n"}\n')
    Path("d.jsonl.gz").write_bytes(gzip.compress(mark + b'{"text": "d\\n"}\n'))
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(mark + b"e\n" + mark + b"f\n")))
    with opened(("a.txt", "b.md.gz", "c.jsonl", "d.jsonl.gz", "-")) as source:
        assert "".join(piece for file in source.files for piece in file.read()) == "a\nb\nc\nd\ne\n\ufefff\n"
        assert look(source).notices == ["standard input: 1 byte-order mark(s) inside the text: kept as they are"]


def test_markup_read_as_plain_text_is_reported(here, monkeypatch):
    made = {
        "a.csv": "id,text\n1,one\n",
        "a.tsv.gz": "id\ttext\n",
        "a.json": '[{"text": "one"}]',
        "a.html": "<p>one</p>",
        "page.txt": "\n<!DOCTYPE html>\n<html><p>one</p></html>",
        "rows.txt": '{"text": "one"}\n{"text": "two"}\n',
        "braces.txt": "{ a set }\n",
        "ok.jsonl": '{"text": "<html>"}\n',
    }
    for name, content in made.items():
        Path(name).write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    assert noticed("braces.txt", "ok.jsonl", "text.txt") == []
    found = {name: noticed(name)[0] for name in made if name not in ("braces.txt", "ok.jsonl")}
    assert found["a.csv"].startswith(
        "a.csv: read as plain text, though it is a table (CSV); to read only the texts of "
    )
    assert found["a.tsv.gz"].startswith("a.tsv.gz: read as plain text, though it is a table (TSV)")
    assert found["a.json"].startswith("a.json: read as plain text, though it is JSON; to read only its texts, ")
    assert found["a.json"].endswith("write one JSON object a line into a .jsonl file")
    assert found["rows.txt"].startswith("rows.txt: read as plain text, though it is JSON; to read only")
    assert found["a.html"].endswith("to get its text alone: pandoc -f html -t plain < a.html > a.utf8.txt")
    assert found["page.txt"].startswith("page.txt: read as plain text, though it is HTML")


@pytest.mark.parametrize("name", ["a table.csv", "a table.tsv.gz"])
def test_the_command_for_a_table_makes_rows_of_it(here, name):
    tab = "\t" if ".tsv" in name else ","
    long = "word " * 30_000  # longer than the csv module reads by default
    content = f'\ufeffid{tab}story\r\n1{tab}"one, ""two""\nthree\tfour é"\r\n2{tab}{long}\r\n'.encode()
    Path(name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    (notice, *_) = noticed(name)
    subprocess.run(notice.partition("; to write them: ")[2], shell=True, check=True, timeout=60)
    with opened(("a table.utf8.jsonl",), text_field="story") as source:
        assert list(source.files[0].read()) == ['one, "two"\nthree\tfour é', long]


def test_a_notice_is_shown_once(here, losscurve):
    Path("text.txt").write_bytes(Path("text.txt").read_bytes().replace(b"\n", b"\r\n"))
    code, _, err = losscurve("prepare text.txt --tokenizer char")
    assert code == 0, err
    assert (
        err.count("note: text.txt: 101 CRLF line end(s), as Windows writes them: kept as they are; to remove them:")
        == 1
    )


# rows with another field


def write_rows(name: str, rows: list[dict[str, object]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


ROWS = [{"id": "x" * 90, "content": f"text {n}\n", "title": "t"} for n in range(40)]
LIKELY = [
    (ROWS[0], "content"),
    ({"id": 1, "my text": "a", "t": ""}, "'my text'"),
    ({"prompt": "a", "answer": "a longer one"}, "answer"),
    ({"id": 1, "n": None}, None),
    ({}, None),
]


@pytest.mark.parametrize(("row", "likely"), LIKELY)
def test_a_missing_field_names_the_flag_and_the_likely_one(here, losscurve, row, likely):
    write_rows("a.jsonl", [row])
    code, _, err = losscurve("prepare a.jsonl --tokenizer byte")
    assert code == 2
    assert err.startswith('error: a.jsonl: line 1: no field "text"')
    if likely:
        assert err.endswith(f"; name the field with the text, perhaps: --text_field {likely}\n")
    else:
        assert "--text_field" not in err


def test_the_field_of_rows_can_be_named(here, losscurve):
    write_rows("a.jsonl", ROWS)
    write_rows("b.jsonl", [{"text": row["content"]} for row in ROWS])
    assert losscurve("prepare b.jsonl --tokenizer byte --data_dir b")[0] == 0
    for data_dir, flag in (("a", "--text_field content"), ("c", "--text-field=content")):
        assert losscurve(f"prepare a.jsonl --tokenizer byte {flag} --data_dir {data_dir}")[0] == 0
        assert Path(data_dir, "train.bin").read_bytes() == Path("b/train.bin").read_bytes()
    named, usual = (json.loads(Path(name, "meta.json").read_text())["settings"] for name in "ab")
    assert named.pop("text_field") == "content"
    assert set(named) == set(usual), "a meta.json of an older version has no such field, and is the same as now"
    assert prepare(("b.jsonl",), Path("d"), "byte", text_field="text")["settings"].keys() == usual.keys()

    def get(data_dir, **more):
        return ensure(from_settings({"tokenizer": "byte", "data_dir": data_dir} | more))

    assert get("b", text="b.jsonl") == get("b", text="b.jsonl", text_field="text") == Path("b")
    assert get("a", text="a.jsonl", text_field="content") == Path("a")
    with pytest.raises(UserError, match="text_field = content, not None"):
        get("a", text="a.jsonl")
    plans = [
        text_of(from_settings({"text": name, "text_field": field, "tokenizer": "byte"})).tokens
        for name, field in (("a.jsonl", "content"), ("b.jsonl", None))
    ]
    assert plans[0] == plans[1]


def test_train_takes_the_field_and_resumes_with_it(here, losscurve):
    import llm

    write_rows("a.jsonl", ROWS)
    small = flags(max_steps=2, eval_every=2, warmup_steps=0)
    assert losscurve(f"train --text a.jsonl --text_field content {small}")[0] == 0
    assert losscurve("train --resume --max_steps 3")[0] == 0
    run = llm.Run.open("checkpoints")
    assert run.config.text_field == "content"
    assert "text_field" not in to_settings(from_settings({})), "as in the config.toml of an older version"


def test_a_column_of_parquet_can_be_named(here, losscurve):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"id": [1, 2], "name": ["b" * 30] * 2, "body": ["first text\n", "second text\n"]}
    parquet.write_table(pyarrow.table(columns), "a.parquet")
    code, _, err = losscurve("prepare a.parquet --tokenizer byte")
    assert code == 2
    assert err.endswith(
        'no column "text" (its columns: id, name, body); name the field with the text, perhaps: --text_field body\n'
    )
    assert losscurve("prepare a.parquet --tokenizer byte --text_field body")[0] == 0
    assert json.loads(Path("data/meta.json").read_text())["source"]["characters"] == 23


def test_a_field_is_for_rows(here, losscurve):
    code, _, err = losscurve("prepare text.txt --tokenizer byte --text_field content")
    assert code == 2
    assert err.startswith("error: text_field = 'content': is for rows of .jsonl, ")
    assert err.endswith("and there are none; leave it out\n")
    assert not Path("data").exists()
    Path("a.csv").write_text("id,content\n1,one\n", encoding="utf-8")
    code, _, err = losscurve("prepare text.txt a.csv --tokenizer byte --text_field content")
    assert code == 2
    refusal, _, command = err.partition("; to write those of a.csv: ")
    assert refusal.startswith("error: text_field = 'content': is for rows of .jsonl, ")
    subprocess.run(command, shell=True, check=True, timeout=60)
    assert losscurve("prepare a.utf8.jsonl --tokenizer byte --text_field content --data_dir rows")[0] == 0
    write_rows("a.jsonl", [ROWS[0], {"text": "a"}])
    code, _, err = losscurve("prepare a.jsonl --tokenizer byte --text_field content")
    assert code == 2
    assert err == (
        'error: a.jsonl: line 2: no field "content" (its fields: text); each line has to be a JSON object with a text, '
        'such as {"content": "…"}\n'
    )
