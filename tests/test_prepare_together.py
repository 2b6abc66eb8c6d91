"""Several runs start together on one new text: one prepares it, the others wait for the tokens."""

import dataclasses
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import words

from llm import storage
from llm.config import from_settings
from llm.errors import UserError
from llm.machine.world import ALONE
from llm.prepare import prepare, reuse
from llm.prepare.reuse import ensure
from llm.text import hub


@pytest.fixture
def config(here, monkeypatch):
    # it names its probe file by the process, and the runs here are threads
    monkeypatch.setattr(storage, "check_writable", lambda *_, **__: None)
    return from_settings({"text": "text.txt", "tokenizer": "byte"})


@pytest.fixture
def held(config):
    """Hold the lock of the token folder for 0.3 seconds, as another process would."""
    taken = threading.Event()
    folder = Path("data/text-byte")

    def hold():
        with storage.locked(folder, "this token folder"):
            taken.set()
            time.sleep(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    yield folder
    thread.join()


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_one_prepares_and_the_others_wait_for_it(config, monkeypatch, tokenizer):
    config = from_settings({"tokenizer": tokenizer, "vocab_size": 300}, config)
    notices = []
    made = []
    write_splits = prepare.write_splits
    together = threading.Barrier(3)

    def slowly(*args):
        time.sleep(0.3)
        made.append(1)
        return write_splits(*args)

    def start(number):
        together.wait()
        return ensure(config, say=lambda line: notices.append((number, line)))

    monkeypatch.setattr(prepare, "write_splits", slowly)
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(start, range(3)))
    assert len(set(folders)) == len(made) == 1
    waiting = [
        number
        for number, line in notices
        if line == f"{folders[0]}: waiting for another process that uses it for this text"
    ]
    assert len(waiting) == len(set(waiting)) == 2  # once each


def test_if_the_preparing_process_ends_the_next_one_prepares(held, config):
    assert not (held / "train.bin").exists()
    assert ensure(config) == held
    assert (held / "train.bin").exists()


def test_a_process_without_progress_is_not_waited_for(held, config, monkeypatch):
    monkeypatch.setattr(reuse, "WAIT", 0.05)
    with pytest.raises(UserError, match="in use by another process, which has made no progress for"):
        ensure(config)


def test_tokens_that_another_process_made_from_another_text_are_refused(here, config):
    Path("more").mkdir()
    Path("more/text.txt").write_text(words(800, seed=1))
    with ThreadPoolExecutor(2) as pool:
        started = [pool.submit(ensure, from_settings({"text": name}, config)) for name in ("text.txt", "more/text.txt")]
        errors = [str(run.exception()) for run in started if run.exception()]
    assert len(errors) == 1
    assert "was made from another text" in errors[0]


def test_the_download_of_another_process_is_waited_for_in_the_cache(config, monkeypatch):
    """The network is not asked again while waiting."""
    taken = threading.Event()
    calls = []
    notices = []
    Path("first.jsonl").write_text(json.dumps({"text": words(900)}))

    def hold():
        with storage.locked(Path("cache"), "this part of the cache"):
            taken.set()
            time.sleep(0.5)

    def fetch(*args):
        calls.append(1)
        with storage.locked(Path("cache"), "this part of the cache"):
            return Path("first.jsonl")

    monkeypatch.setattr(hub, "fetch", fetch)
    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    assert ensure(from_settings({"text": "tinystories"}, config), say=notices.append) == Path("data/tinystories-byte")
    thread.join()
    assert len(calls) == 2
    assert notices == ["cache: waiting for another process that uses it for this text"]


def test_a_folder_in_use_is_a_user_error_on_all_processes():
    exchanged = []
    world = dataclasses.replace(ALONE, size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(world), "_exchange", lambda self, outcome: exchanged.append(outcome))
        with pytest.raises(storage.InUse), world.together():
            raise storage.InUse(Path("data"), "data: in use")
    assert exchanged == [{"error": "UserError", "message": "data: in use"}]


def test_another_process_may_finish_between_a_look_and_the_lock(here, monkeypatch):
    config = from_settings({"text": "text.txt", "tokenizer": "char"})

    def prepared_twice(*args, **kwargs):
        prepare.prepare(*args, **kwargs)
        prepare.prepare(*args, **kwargs)

    monkeypatch.setattr(reuse, "prepare", prepared_twice)
    assert ensure(config) == Path("data/text-char")
    with pytest.raises(UserError, match="made with tokenizer"):
        ensure(from_settings({"text": "text.txt", "tokenizer": "byte", "data_dir": "data/text-char"}))
