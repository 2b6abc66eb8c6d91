"""Corpora: files, folders, pipes, exact UTF-8 errors, and downloads that never leave a partial file."""

import hashlib
import http.server
import io
import os
import socket
import threading
import time
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.errors import Failure, UserError
from llm.storage import download
from llm.text import corpus, text_file
from llm.text.corpus import documents_between, look, name_of, opened

CONTENT = b"To be, or not to be"


def read(*text: str) -> list[str]:
    with opened(text) as source:
        return ["".join(document.read()) for document in source.files]


def test_files_folders_and_order(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.txt", "a/z.md", "a/b.TXT", "a/no.py", ".hidden/x.txt", "a/.y.txt", "any.csv"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(name)
    assert read(".") == ["a/b.TXT", "a/z.md", "b/2.txt"]
    assert read("b", "a/z.md", "any.csv") == ["b/2.txt", "a/z.md", "any.csv"]
    with opened(("b", "any.csv")) as source:
        assert source.stamps()[1] == {"path": "any.csv", "size": 7, "mtime_ns": os.stat("any.csv").st_mtime_ns}


def test_bytes_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("a\r\nb\rc\n\x1c\u2028" + "x" * 1000 + "\0", "", "\ufeff\ufeffx"):
        path.write_bytes(text.encode())
        assert read(str(path)) == [text.removeprefix("\ufeff")]


def test_a_byte_order_mark_inside_a_text_is_kept(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(text_file, "CHUNK", 3)
    (tmp_path / "a.txt").write_bytes("\ufeffabc\ufeffd".encode())
    assert read(str(tmp_path / "a.txt")) == ["abc\ufeffd"]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), st.integers(1, 5))
def test_any_chunk_size_reads_the_same(text: str, chunk: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_file, "CHUNK", chunk)
        Path(folder, "a").write_bytes(text.encode())
        assert read(f"{folder}/a") == [text.removeprefix("\ufeff")]


@pytest.mark.parametrize("chunk", [1, 2, 3, 4096])
@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"ab\xff", 2),
        ("é".encode() * 5 + b"\xc3(", 10),
        (b"abc\xe4\xb8", 3),
        (b"\xffa", 0),
        (b"a\xed\xa0\x80", 1),
    ],
)
def test_a_utf8_error_names_the_byte(tmp_path: Path, monkeypatch, chunk: int, content: bytes, place: int) -> None:
    monkeypatch.setattr(text_file, "CHUNK", chunk)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.txt: not UTF-8 at byte {place} "):
        read(str(tmp_path / "a.txt"))


def test_an_unreadable_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.txt: there is no such file"):
        read(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match=r"no file that ends in \.txt, \.md"):
        read(str(tmp_path))
    for word in ("a\0b", str(tmp_path / ("x" * 300)), ""):
        with pytest.raises(UserError):
            read(word)


def test_standard_input_and_pipes_are_copied_to_a_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(CONTENT)))
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"piped",)).start()
    with opened(("-", str(tmp_path / "pipe"))) as source:
        for _ in range(2):  # a text is read more than once
            assert ["".join(document.read()) for document in source.files] == [CONTENT.decode(), "piped"]
        kept = source.files[0].path
    assert not kept.exists()


def test_a_text_has_a_short_name() -> None:
    names = {(): "shakespeare", ("shakespeare",): "shakespeare", ("-",): "stdin", ("a/My book.txt", "b"): "My book"}
    for text, name in names.items():
        assert name_of(text) == name
    assert name_of((".",)) == Path.cwd().stem


def test_survey_and_documents_between(tmp_path: Path) -> None:
    texts = ["añb", "", "中文🙂", "z"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    whole = "".join(texts)
    with opened((str(tmp_path),)) as source:
        survey = look(source, alphabet=True)
        assert (survey.characters, survey.total, survey.bytes) == ([3, 0, 3, 1], 7, len(whole.encode()))
        assert survey.alphabet == set(whole)
        assert survey.sha256 == hashlib.sha256(whole.encode()).hexdigest()
        for start in range(8):
            for stop in range(8):
                found = [(end, "".join(chunks)) for end, chunks in documents_between(source, survey, start, stop)]
                assert "".join(text for _, text in found) == whole[start:stop]
                ends = {3: "añb", 6: "中文🙂", 7: "z"}
                assert all(text and text in ends[end] for end, text in found)


def test_the_built_in_text_replaces_shakespeare_if_unavailable(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LOSSCURVE_CACHE", str(tmp_path))
    with opened((), offline=True) as source:
        assert source.name == corpus.BUILT_IN
        assert "tiny Shakespeare" in source.missing
        assert look(source).bytes > 100_000
    with pytest.raises(Failure, match="--offline"), opened(("shakespeare",), offline=True):
        pass


def test_cached_shakespeare_is_neither_locked_nor_written(monkeypatch) -> None:
    if not (corpus.storage.cache_folder() / "tinyshakespeare" / "input.txt").exists():
        pytest.skip("tiny Shakespeare is not in LOSSCURVE_CACHE")
    monkeypatch.setattr(download, "_get", None)
    monkeypatch.setattr(corpus.storage, "writing", None)
    with opened(("shakespeare",)) as source:
        assert look(source).sha256 == corpus.SHAKESPEARE_SHA256


# downloads


@pytest.fixture
def server():
    """Run a local server whose answer depends on the path."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404 if self.path == "/404" else 200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write({"/wrong": CONTENT.upper(), "/short": CONTENT[:-5]}.get(self.path, CONTENT))

        def log_message(self, *args) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{made.server_address[1]}"
        made.shutdown()


def fetch(url: str, path: Path, **more) -> Path:
    return download.fetch(url, path, hashlib.sha256(CONTENT).hexdigest(), "the text", **more)


def test_a_download_is_kept(server: str, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "text"
    assert fetch(server, path).read_bytes() == CONTENT
    assert fetch("http://127.0.0.1:9", path) == path  # not fetched again
    path.write_bytes(b"changed")
    assert fetch(server, path).read_bytes() == CONTENT  # a damaged one is replaced
    assert [p.name for p in path.parent.iterdir()] == ["text"]


@pytest.mark.parametrize("answer", ["/404", "/short", "/wrong"])
def test_a_bad_download_leaves_nothing(server: str, tmp_path: Path, answer: str) -> None:
    with pytest.raises(Failure, match="the text"):
        fetch(server + answer, tmp_path / "text")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_download_leaves_nothing(server: str, tmp_path: Path, monkeypatch) -> None:
    def interrupted(*args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(server, tmp_path / "text")
    assert not list(tmp_path.iterdir())


def test_a_missing_network_is_reported_within_seconds(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(download, "CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        start = time.monotonic()
        for url in (f"http://127.0.0.1:{silent.getsockname()[1]}", "http://127.0.0.1:9", "http://name.invalid"):
            with pytest.raises(Failure, match="cannot be reached"):
                fetch(url, tmp_path / "text")
        monkeypatch.setattr("socket.getaddrinfo", lambda *args, **more: time.sleep(2))  # a resolver that hangs
        with pytest.raises(Failure, match=r"no answer in 0\.5 s"):
            fetch("http://name.invalid", tmp_path / "text")
        assert time.monotonic() - start < 5
    with pytest.raises(Failure, match="--offline"):
        fetch("http://127.0.0.1:9", tmp_path / "text", offline=True)


def test_a_cache_that_cannot_be_written_is_named(server: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Failure, match="LOSSCURVE_CACHE"):
        fetch(server, tmp_path / "file" / "text")
