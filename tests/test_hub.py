"""Named texts of the hub, with a fake datasets package: downloaded once, up to the limit, or not at all."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest

from llm.commands.main import run_command
from llm.config import from_settings
from llm.errors import Failure, UserError
from llm.plan import text_size
from llm.prepare.reuse import ensure
from llm.storage import download
from llm.text import hub
from llm.text.corpus import opened

STORIES = [f"Story {n}: once upon a time.\n" for n in range(200)]


class Hub:
    """A fake datasets package: records the calls of `load_dataset`, and streams rows."""

    def __init__(self):
        self.asked, self.sent, self.rows, self.error = [], 0, [{"text": text} for text in ["", *STORIES]], None

    def load_dataset(self, *words, **more):
        self.asked.append((words, more))
        return self.stream()

    def stream(self):
        for number, row in enumerate(self.rows):
            if self.error and number == self.error[0]:
                raise self.error[1]
            self.sent += 1
            yield row


@pytest.fixture
def there(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOSSCURVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setattr(download, "unreachable", lambda url: "" if url == "https://huggingface.co" else "no such place")
    made = Hub()
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=made.load_dataset))
    return made


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_text_is_downloaded_once_up_to_the_limit(there):
    notices = []
    path = hub.fetch("tinystories", 1000, False, notices.append)
    found = texts(path)
    assert found == STORIES[: len(found)]
    assert sum(map(len, found[:-1])) < 1000 <= sum(map(len, found))
    assert there.asked == [(("roneneldan/TinyStories", None), {"split": "train", "streaming": True})]
    assert there.sent <= len(found) + 2  # not the whole text
    assert len(notices) == 1
    assert "1,000 characters of tinystories" in notices[0]
    there.error = (0, ConnectionError("gone"))
    assert hub.fetch("tinystories", 1000, True, notices.append) == path
    assert len(notices) == len(there.asked) == 1
    with pytest.raises(Failure, match="gone"):
        hub.fetch("tinystories", 2000, False, notices.append)
    assert [p.name for p in path.parent.iterdir() if p.suffix] == ["first-1000.jsonl"]
    there.error = None
    assert texts(hub.fetch("fineweb-edu", None, False, notices.append)) == STORIES  # the text ends before the limit
    assert there.asked[-1][0] == ("HuggingFaceFW/fineweb-edu", "sample-10BT")


def test_an_interrupted_download_leaves_nothing(there):
    for error in (ConnectionError("reset by\npeer"), KeyError("x"), RuntimeError()):
        there.error = (50, error)
        with pytest.raises(Failure, match="cannot be read from the Hugging Face hub") as caught:
            hub.fetch("tinystories", None, False, lambda line: None)
        assert "\n" not in str(caught.value)
    there.error = (50, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        hub.fetch("tinystories", None, False, lambda line: None)
    assert {p.name for p in Path("cache/tinystories").iterdir()} == {".lock"}
    there.error, there.rows = None, [{"text": ""}]
    with pytest.raises(Failure, match="no text"):
        hub.fetch("tinystories", None, False, lambda line: None)
    there.rows = [{"content": "a"}]
    with pytest.raises(Failure, match="'text'"):
        hub.fetch("tinystories", None, False, lambda line: None)


def test_a_missing_network_or_package_is_named(there, monkeypatch, capsys):
    assert run_command("prepare", ["tinystories", "--offline", "--tokenizer", "byte"]) == 1
    assert "--offline was given" in capsys.readouterr().err
    monkeypatch.setattr(download, "unreachable", lambda url: "Name or service not known")
    assert run_command("prepare", ["tinystories", "--tokenizer", "byte"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "Name or service not known" in err
    assert "connect to the network" in err
    assert not there.asked
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert run_command("prepare", ["fineweb-edu", "--tokenizer", "byte"]) == 2
    assert "pip install 'losscurve[data]'" in capsys.readouterr().err
    assert not Path("data").exists()
    assert not Path("cache").exists()


def test_a_missing_network_is_noticed_within_seconds(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "CONNECT_SECONDS", 0.3)
    assert download.unreachable("http://127.0.0.1:9")
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **more: __import__("time").sleep(1))
    assert "no answer" in download.unreachable("http://name.invalid")


def test_a_full_cache_is_named(there, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
    with pytest.raises(UserError, match="MiB needed"):
        hub.fetch("tinystories", 10**6, False, lambda line: None)
    Path("cache").touch()
    with pytest.raises((Failure, UserError), match="cache"):
        hub.fetch("tinystories", 10, False, lambda line: None)


def test_the_command_and_using_it_again(there, capsys):
    assert run_command("prepare", ["tinystories", "--text_limit", "2k", "--tokenizer", "byte", "--data_dir", "d"]) == 0
    meta = json.loads(Path("d/meta.json").read_text())
    assert meta["settings"]["text_limit"] == 2000
    assert meta["source"]["name"] == "tinystories"
    assert meta["source"]["documents"] > 50
    assert run_command("prepare", ["tinystories", "--text_limit", "2z", "--tokenizer", "byte", "--data_dir", "e"]) == 2
    assert "a number of characters such as 50M" in capsys.readouterr().err
    Path("own.txt").write_text("own text")
    assert run_command("prepare", ["own.txt", "--text_limit", "5", "--tokenizer", "byte", "--data_dir", "e"]) == 2
    assert "is for tinystories and fineweb-edu" in capsys.readouterr().err

    def get(**more):
        return ensure(from_settings({"text": "tinystories", "tokenizer": "byte"} | more))

    assert get(text_limit="3K") == get(text_limit="3000") == Path("data/tinystories-byte")
    with pytest.raises(UserError, match="text_limit = 3000, not 4000"):
        get(text_limit=4000)
    with pytest.raises(UserError, match="text_limit = 3000, not None"):
        get()


def test_a_plan_downloads_nothing(there):
    text = text_size.text_of(
        from_settings({"text": ["tinystories", "shakespeare"], "text_limit": "3M", "tokenizer": "byte"})
    )
    assert text.unprepared == 3_000_000 + text_size.TEXT_BYTES
    assert text.tokens == int(0.9 * text.unprepared)
    assert not there.asked


def test_a_name_is_a_name_and_a_path_a_path(there):
    Path("tinystories").write_text("my own")
    with opened(("./tinystories",)) as source:
        assert list(source.files[0].read()) == ["my own"]
    with opened(("tinystories",), limit=100) as source:
        assert "".join(source.files[0].read()).startswith("Story 0")
