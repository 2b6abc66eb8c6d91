"""Tokenizer processes: the ids of the tokenizer itself, from several threads, and a worker that dies or hangs."""

import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import words

from llm.errors import Failure
from llm.prepare import prepare, shards, workers
from llm.prepare.workers import Worker, Workers
from llm.tokens.bpe import train_bpe
from llm.tokens.cut import LONG_SPACE, has_long_space
from llm.tokens.saved_tokenizer import save_tokenizer


@pytest.fixture
def saved(tmp_path):
    tokenizer = train_bpe([words(500)], 300)
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    return tokenizer, tmp_path / "tokenizer.json"


def test_each_thread_has_a_worker_and_its_own_answer(saved):
    tokenizer, path = saved
    workers, texts = Workers(path), [words(200, seed) + "é 世界 \0" for seed in range(20)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(workers.encode, texts))
    workers.close()
    assert all(np.array_equal(ids, tokenizer.encode(text)) for ids, text in zip(found, texts, strict=True))
    assert 1 <= len(workers._all) <= 2
    assert all(worker.process.returncode == 0 for worker in workers._all)


def test_a_worker_that_dies_is_reported(saved):
    workers = Workers(saved[1])
    workers.encode("abc")
    workers._all[0].process.send_signal(signal.SIGKILL)
    workers._all[0].process.wait()
    with pytest.raises(Failure, match=r"a tokenizer process ended \(exit code -9\); prepare the text again"):
        workers.encode("abc")
    workers.close()


def test_a_worker_whose_parent_was_killed_ends_silently(saved):
    """The system closes the dead parent's end of the connection, here before the answer was read."""
    worker = Worker(saved[1])
    worker.answer()
    worker._pipe.send_bytes(words(200_000).encode())
    worker._pipe.close()
    assert worker.process.wait() == 0
    worker._output.seek(0)
    assert worker._output.read() == b""
    worker.close()


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """`custom(code)` makes every new Python run the code first, from the caller's PYTHONPATH."""

    def write(code: str) -> None:
        (tmp_path / "custom").mkdir()
        (tmp_path / "custom" / "sitecustomize.py").write_text(code)

    monkeypatch.syspath_prepend(tmp_path / "custom")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "custom"))
    return write


def test_output_of_a_worker_is_not_an_answer(saved, custom, tmp_path):
    custom(f"print('hello' * 1000); open({str(tmp_path / 'ran')!r}, 'w').close()")
    workers = Workers(saved[1])
    assert np.array_equal(workers.encode("abc abd"), saved[0].encode("abc abd"))
    workers.close()
    assert (tmp_path / "ran").exists()  # the caller's PYTHONPATH was kept


@pytest.mark.parametrize("name", ["queue.py", "random.py", "typing.py", "numpy.py", "tokenizers.py", "llm.py"])
def test_a_worker_imports_no_module_from_the_working_folder(saved, here, name):
    (here / name).write_text("raise RuntimeError('not the module you meant')")
    workers = Workers(saved[1])
    assert np.array_equal(workers.encode("abc abd"), saved[0].encode("abc abd"))
    workers.close()


def test_a_worker_that_hangs_is_noticed(saved, custom, monkeypatch):
    custom("import sys, time; print('waiting for a licence', file=sys.stderr, flush=True); time.sleep(60)")
    monkeypatch.setattr(workers, "PATIENCE", 1)
    pool = Workers(saved[1])
    with pytest.raises(Failure, match="gave no answer for 1 s; its last output: waiting for a licence; "):
        pool.encode("abc")
    pool.close()
    assert pool._all[0].process.returncode == -signal.SIGKILL


def test_a_worker_that_cannot_start_names_the_cause(saved, custom):
    custom("import os; os.write(2, b'a trace\\nKeyError: 7\\n\\n'); os._exit(3)")
    workers = Workers(saved[1])
    with pytest.raises(Failure, match=r"ended \(exit code 3\); its last output: KeyError: 7; prepare the text again"):
        workers.encode("abc")
    workers.close()


def test_large_texts_are_prepared_by_workers_with_the_same_ids(monkeypatch, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(words(4000), encoding="utf-8")
    prepare.prepare((str(text),), tmp_path / "small", "bpe", vocab_size=300)
    monkeypatch.setattr(shards, "LARGE", 100)
    started = []
    monkeypatch.setattr(shards, "Workers", lambda path: started.append(Workers(path)) or started[0])
    prepare.prepare((str(text),), tmp_path / "large", "bpe", vocab_size=300)
    assert started[0]._all
    for name in ("train.bin", "val.bin", "tokenizer.json"):
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "large" / name).read_bytes()


@pytest.mark.parametrize("length", [0, 7, 4095, 4096, 5000, 70_000])
@pytest.mark.parametrize("before", [0, 1, 511, 3000])
def test_long_spaces_are_found(length, before):
    text = "a" * before + " \n\t\u3000"[: length % 4] + " " * (length - length % 4) + "b" * 1000
    assert has_long_space(text) == (LONG_SPACE.search(text) is not None) == (length >= 4096)
