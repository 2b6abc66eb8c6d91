"""A tokenizer in processes of its own, one a core: threads of one process tokenize little faster than one does.

A worker reads pieces of text and answers with their ids until its program closes the connection or is gone. A message
may hold several texts, since one message for each of millions of short ones would take more time than they do. The
connection is a channel of its own: what a library prints in a worker goes into a file, where errors are looked for.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from multiprocessing import connection
from pathlib import Path
from typing import IO, Any

import numpy as np

from llm.errors import Failure
from llm.machine.interpreter import child_environment, stand_in
from llm.tokens.saved_tokenizer import load_tokenizer
from llm.tokens.tokenizer import Ids, Tokenizer

BETWEEN = b"\xff"  # texts of a message: no UTF-8 has this byte


READY = b"ready"  # a worker's first message


PATIENCE = 120  # seconds for an answer, which takes less than one


class Workers:
    """`encode` for several threads at once: each that calls it has a worker. `close` ends them."""

    def __init__(self, tokenizer_json: Path) -> None:
        self._tokenizer_json = tokenizer_json
        self._mine = threading.local()
        self._all: list[Worker] = []

    def encode(self, *texts: str) -> Ids:
        """Return the ids of `texts`, as `joined` has them. Raises Failure if the worker ended or hangs."""
        if not hasattr(self._mine, "worker"):
            worker = Worker(self._tokenizer_json)
            self._all.append(worker)
            worker.answer()
            self._mine.worker = worker
        answer = self._mine.worker.ask(BETWEEN.join(text.encode("utf-8") for text in texts))
        return np.frombuffer(answer, "<u4")

    def close(self) -> None:
        for worker in self._all:
            worker.close()


class Worker:
    """One process, and the connection to it."""

    def __init__(self, tokenizer_json: Path) -> None:
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115, it is closed with the worker
        self._pipe, theirs = connection.Pipe()
        command = [sys.executable, "-m", "llm.tokens.workers", str(tokenizer_json), str(theirs.fileno())]
        inherit: dict[str, Any] = {"pass_fds": [theirs.fileno()]}
        if os.name == "nt":
            os.set_handle_inheritable(theirs.fileno(), True)  # type: ignore[attr-defined]
            inherit = {"close_fds": False}
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": self._said, "stderr": self._said}
        try:
            with theirs:
                self.process = subprocess.Popen(command, env=child_environment(), **streams, **inherit)
        except OSError as error:
            self._pipe.close()
            self._said.close()
            cause = f"a tokenizer process cannot be started ({error.strerror})"
            raise Failure(f"{cause}; end other programs, then prepare the text again") from None

    def ask(self, message: bytes) -> bytes:
        with contextlib.suppress(OSError):  # it is gone: `answer` says so
            self._pipe.send_bytes(message)
        return self.answer()

    def answer(self) -> bytes:
        """Return the next message. Raises Failure where none comes."""
        try:
            for _ in range(PATIENCE):  # not by the clock, which goes on while both are stopped (Ctrl-Z)
                if self._pipe.poll(1):
                    return self._pipe.recv_bytes()
        except (OSError, EOFError):
            cause = f"a tokenizer process ended (exit code {self.process.wait()})"
        else:
            self.process.kill()
            cause = f"a tokenizer process gave no answer for {PATIENCE} s"
        raise Failure(f"{cause}{self._last_words()}; {stand_in() or 'prepare the text again'}")

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"; its last words: {last[:200]}" if last else ""

    def close(self) -> None:
        self._pipe.close()  # then it ends
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._said.close()


def joined(tokenizer: Tokenizer, *texts: str) -> Ids:
    """The ids of `texts`, with an end-of-text between each two where there is such a token."""
    between = [] if tokenizer.end_of_text is None else [np.array([tokenizer.end_of_text], np.uint32)]
    parts = [part for text in texts for part in (*between, tokenizer.encode(text))]
    return np.concatenate(parts[len(between) :])


def main(tokenizer_json: str, handle: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that started it
    # the class that `connection.Pipe` makes on this system
    ours: Any = connection.PipeConnection if os.name == "nt" else connection.Connection  # type: ignore[attr-defined]
    with ours(int(handle)) as pipe:
        tokenizer = load_tokenizer(Path(tokenizer_json))
        with contextlib.suppress(EOFError, ConnectionError):  # the program closed it, or is gone
            pipe.send_bytes(READY)
            while True:
                texts = pipe.recv_bytes().split(BETWEEN)
                ids = joined(tokenizer, *(text.decode("utf-8") for text in texts))
                pipe.send_bytes(ids.astype("<u4").tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
