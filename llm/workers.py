"""A tokenizer in processes of its own, one a core: threads of one process tokenize little faster than one does.

A worker, `python -m llm.workers tokenizer.json`, reads pieces of text and writes their ids until its input ends, as it
does too when the program that started it is gone. A message is its length (8 bytes, little-endian) and then its bytes;
it may hold several texts, since one for each of millions of short ones would take more time than they do.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import numpy as np

from llm.errors import Failure
from llm.tokenizer import Ids, Tokenizer, load_tokenizer

BETWEEN = b"\xff"  # texts of a message: no UTF-8 has this byte


class Workers:
    """`encode` for several threads at once: each that calls it has a worker. `close` ends them."""

    def __init__(self, tokenizer_json: Path) -> None:
        self._command = [sys.executable, "-m", "llm.workers", str(tokenizer_json)]
        self._mine = threading.local()
        self._all: list[subprocess.Popen[bytes]] = []

    def encode(self, *texts: str) -> Ids:
        """The ids of `texts`, as `joined` has them. Raises Failure if the worker is gone."""
        if not hasattr(self._mine, "worker"):
            where = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}  # that `llm` was imported from
            pipe = subprocess.PIPE
            self._mine.worker = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, env=where)
            self._all.append(self._mine.worker)
        worker = self._mine.worker
        try:
            send(worker.stdin, BETWEEN.join(text.encode("utf-8") for text in texts))
            answer = receive(worker.stdout)
        except BrokenPipeError:
            answer = None
        if answer is None:
            raise Failure(f"a tokenizer process ended (exit code {worker.wait()}); prepare the text again")
        return np.frombuffer(answer, "<u4")

    def close(self) -> None:
        for worker in self._all:
            assert worker.stdin
            assert worker.stdout
            with contextlib.suppress(BrokenPipeError):  # it was gone before
                worker.stdin.close()  # at the end of its input it ends
            worker.stdout.close()
            worker.wait()


def joined(tokenizer: Tokenizer, *texts: str) -> Ids:
    """The ids of `texts`, with an end-of-text between each two where there is such a token."""
    between = [] if tokenizer.end_of_text is None else [np.array([tokenizer.end_of_text], np.uint32)]
    parts = [part for text in texts for part in (*between, tokenizer.encode(text))]
    return np.concatenate(parts[len(between) :])


def send(stream: IO[bytes], message: bytes) -> None:
    stream.write(len(message).to_bytes(8, "little") + message)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes | None:
    """The next message, None where there is no whole one any more."""
    length = int.from_bytes(stream.read(8), "little")
    message = stream.read(length)
    return message if length and len(message) == length else None


def main(tokenizer_json: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that started it
    tokenizer = load_tokenizer(Path(tokenizer_json))
    try:
        while (message := receive(sys.stdin.buffer)) is not None:
            ids = joined(tokenizer, *(text.decode("utf-8") for text in message.split(BETWEEN)))
            send(sys.stdout.buffer, ids.astype("<u4").tobytes())
    except BrokenPipeError:  # the program was killed; what is still held back would be tried again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main(sys.argv[1])
