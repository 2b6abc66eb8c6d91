"""Rows of JSON Lines and Parquet: each is a document, read in bounded memory; errors name the line and the field."""

import builtins
import datetime
import gzip
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.commands.main import run_command
from llm.errors import UserError
from llm.prepare.prepare import prepare
from llm.text import rows
from llm.text.corpus import documents_between, look, opened

TEXTS = ["one", "", "two\nlines", "dré 🙂", "x" * 3000]


def lines(texts, **more):
    return "".join(json.dumps({"id": 1, "text": text} | more) + "\n" for text in texts).encode()


def parquet(path, columns, **options):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, **options)
    return str(path)


def read(path):
    return list(rows.read_rows(Path(path), str(path)))


def test_each_row_is_a_document(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(TEXTS))
    (tmp_path / "b.NDJSON").write_bytes(b"\n" + lines(TEXTS).replace(b"\n", b"\r\n\n").rstrip())
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS)))
    parquet(tmp_path / "d.parquet", {"id": [1] * 5, "text": TEXTS}, row_group_size=2)
    for name in ("a.jsonl", "b.NDJSON", "c.jsonl.gz", "d.parquet"):
        assert read(tmp_path / name) == TEXTS
    (tmp_path / "e.txt").write_text("plain")
    (tmp_path / "f.csv").write_text("no")
    with opened((str(tmp_path),)) as source:
        assert [file.path.name[0] for file in source.files] == ["a", "b", "c", "d", "e"]
        survey = look(source)
        joined = "".join(TEXTS)
        assert survey.documents == 4 * 4 + 1
        assert survey.characters == [len(joined)] * 4 + [5]
        assert survey.bytes == len(joined.encode()) * 4 + 5
        whole = joined * 4 + "plain"
        for start, stop in ((0, survey.total), (2, 9), (len(joined) - 1, 2 * len(joined) + 4), (3, 3), (11, 12)):
            found = [(end, "".join(text)) for end, text in documents_between(source, survey, start, stop)]
            assert "".join(text for _, text in found) == whole[start:stop]
            assert all(whole[:end].endswith(text) for end, text in found if end <= stop)


@pytest.mark.parametrize("whole", [False, True])
def test_the_size_of_the_text_is_estimated_from_the_first_rows(tmp_path, monkeypatch, whole):
    """Also if the rows are compressed, or hold more than the text."""
    texts = [f"é{n} " + random.Random(n).randbytes(50).hex() * 2 for n in range(20_000)]
    there = sum(len(text.encode()) for text in texts)
    monkeypatch.setattr(rows, "SAMPLE", there + 1 if whole else there // 2)
    (tmp_path / "a.jsonl").write_bytes(lines(texts, url="x" * 100))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(texts, url="x" * 100)))
    parquet(tmp_path / "c.parquet", {"text": texts})
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        found = rows.estimate_text_bytes(tmp_path / name, name)
        assert found == (there if whole else pytest.approx(there, rel=0.1)), name
        assert (found == there) == whole, "all of it was read"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=6))
def test_any_text_survives_json(texts):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.jsonl")
        for ascii_only in (True, False):
            path.write_text(
                "".join(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts), encoding="utf-8"
            )
            assert read(path) == texts


def test_rows_that_are_cut_elsewhere_are_another_text(tmp_path):
    sums = []
    for texts in (["ab", "c"], ["a", "bc"], ["ab", "", "c"]):
        (tmp_path / "a.jsonl").write_bytes(lines(texts))
        with opened((str(tmp_path / "a.jsonl"),)) as source:
            sums.append(look(source).sha256)
    assert sums[0] != sums[1]
    assert sums[0] == sums[2]  # an empty row is no document


BAD = {
    b"{": "not JSON",
    b"null": "null, not an object",
    b'["text"]': "a list, not an object",
    b'"text"': "a text, not an object",
    b"3": "a number, not an object",
    b"{}": 'no field "text" (its fields: none)',
    b'{"content": "a", "id": 3}': 'no field "text" (its fields: content, id)',
    b'{"text": 3}': 'field "text" is a number',
    b'{"text": null}': 'field "text" is null, not a text',
    b'{"text": ["a"]}': 'field "text" is a list',
    b'{"text": {"text": "a"}}': 'field "text" is an object',
    b'{"text": true}': 'field "text" is a boolean',
    b'{"text": "a\xff"}': "not UTF-8 at its byte 11",
    b'{"text": "a\\ud800b"}': 'field "text" holds a lone surrogate (U+D800)',
    b'{"text": "a"} {"text": "b"}': "not JSON",
    b"[" * 100_000: "not JSON",
    b'{"text": ' + b"1" * 5000 + b"}": "not JSON",
    b"\x00": "not JSON",
}


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named(tmp_path, bad, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_bytes(lines(["x", "y"]) + b"\n" + bad + b"\n" + lines(["z"]))
    with pytest.raises(UserError) as caught:
        read("a.jsonl")
    assert str(caught.value).startswith(f"a.jsonl: line 4: {BAD[bad]}")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="line 4"):
        prepare(("a.jsonl",), Path("d"), "byte")
    assert not Path("d").exists()


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LONGEST", 100)
    (tmp_path / "long.jsonl").write_bytes(lines(["a", "b" * 200]))
    whole = gzip.compress(lines(TEXTS[:3]) * 50)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    (tmp_path / "other.jsonl.gz").write_bytes(lines(["a"]))
    (tmp_path / "torn.jsonl.gz").write_bytes(whole[:20] + b"\xff\xff\xff" + whole[23:])
    (tmp_path / "no.parquet").write_bytes(b"PAR1 and nothing of it PAR1")
    (tmp_path / "empty.parquet").write_bytes(b"")
    messages = {
        "long.jsonl": "line 2: longer than 100 bytes",
        "cut.jsonl.gz": "cannot be read",
        "other.jsonl.gz": "its name ends in .gz, but its content is not in that format",
        "torn.jsonl.gz": "",
        "none.jsonl": "cannot be read",
        "no.parquet": "cannot be read as Parquet",
        "empty.parquet": "cannot be read as Parquet",
        "none.parquet": "cannot be read as Parquet",
    }
    for name, message in messages.items():
        if name.endswith("parquet"):
            pytest.importorskip("pyarrow")
        with pytest.raises(UserError) as caught:
            read(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: {message}"), name
        assert "\n" not in str(caught.value)


def test_a_bad_parquet_is_named(tmp_path):
    for columns, message in (
        ({"content": ["a"], "id": [1]}, 'no column "text" (its columns: content, id)'),
        ({"text": [1, 2]}, 'row 1: column "text" is a number, not a text'),
        ({"text": ["a", "b", None]}, 'row 3: column "text" is null, not a text'),
        ({"text": [["a"]]}, 'row 1: column "text" is a list, not a text'),
        ({"text": [datetime.date(2020, 1, 2)]}, 'row 1: column "text" is a date, not a text'),
        ({"text": [b"a", b"\xff"]}, 'row 2: column "text" is not UTF-8'),
    ):
        path = parquet(tmp_path / "a.parquet", columns)
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: {message}")
    assert read(parquet(tmp_path / "a.parquet", {"text": ["é".encode(), b"b"]})) == ["é", "b"]
    path = Path(parquet(tmp_path / "b.parquet", {"text": ["abcdef" * 99] * 2000}, compression="none"))
    whole = path.read_bytes()
    path.write_bytes(whole[:3000] + b"\xff" * 5000 + whole[8000:])
    with pytest.raises(UserError, match=r"b\.parquet: "):
        read(path)


def test_a_missing_pyarrow_package_is_named(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"")
    real = builtins.__import__

    def absent(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.chdir(tmp_path)
    assert run_command("prepare", ["a.parquet", "--tokenizer", "byte"]) == 2
    err = capsys.readouterr().err
    assert err == (
        "error: a.parquet: Parquet needs the pyarrow package; install it with: pip install 'losscurve[data]'\n"
    )
    assert not Path("data").exists()
