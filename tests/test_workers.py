"""Tokenizer processes: the ids of the tokenizer itself, from several threads, and a worker that dies."""

import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import words

from llm import prepare as preparing
from llm import shards
from llm.cut import LONG_SPACE, has_long_space
from llm.errors import Failure
from llm.tokenizer import save_tokenizer, train_bpe
from llm.workers import Workers, send

OURS = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}


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
    assert all(worker.returncode == 0 for worker in workers._all)


def test_a_worker_that_dies_is_said(saved):
    workers = Workers(saved[1])
    workers.encode("abc")
    workers._all[0].send_signal(signal.SIGKILL)
    workers._all[0].wait()
    with pytest.raises(Failure, match="a tokenizer process ended"):
        workers.encode("abc")
    workers.close()


def test_a_worker_whose_program_was_killed_ends_without_a_word(saved):
    worker = Workers(saved[1])._command
    process = subprocess.Popen(worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=OURS)
    process.stdout.close()
    send(process.stdin, words(200).encode())
    process.stdin.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


def test_large_texts_are_prepared_by_workers_with_the_same_ids(monkeypatch, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(words(4000), encoding="utf-8")
    preparing.prepare((str(text),), tmp_path / "small", "bpe", vocab_size=300)
    monkeypatch.setattr(shards, "LARGE", 100)
    started = []
    monkeypatch.setattr(shards, "Workers", lambda path: started.append(Workers(path)) or started[0])
    preparing.prepare((str(text),), tmp_path / "large", "bpe", vocab_size=300)
    assert started[0]._all
    for name in ("train.bin", "val.bin", "tokenizer.json"):
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "large" / name).read_bytes()


@pytest.mark.parametrize("length", [0, 7, 4095, 4096, 5000, 70_000])
@pytest.mark.parametrize("before", [0, 1, 511, 3000])
def test_long_spaces_are_found(length, before):
    text = "a" * before + " \n\t\u3000"[: length % 4] + " " * (length - length % 4) + "b" * 1000
    assert has_long_space(text) == (LONG_SPACE.search(text) is not None) == (length >= 4096)
