"""Tokenizer processes, one a core: threads of one process tokenize little faster than one thread.

A worker reads pieces of text and answers with their ids until its parent closes the connection or ends. A message may
hold several texts, because one message for each of millions of short texts takes longer than tokenizing them. The
connection is a channel of its own: what a library prints in a worker goes into a file, which error messages quote.
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

SEPARATOR = b"\xff"  # between the texts of a message; UTF-8 never contains this byte


READY = b"ready"  # a worker's first message


PATIENCE = 120  # seconds that an answer may take; it takes less than one


class Workers:
    """Tokenize in several threads at once: each thread that calls `encode` has its own worker.

    `close` ends the workers.
    """

    def __init__(self, tokenizer_json: Path) -> None:
        self._tokenizer_json = tokenizer_json
        self._of_this_thread = threading.local()
        self._all: list[Worker] = []

    def encode(self, *texts: str) -> Ids:
        """Return the ids of `texts`, as `encode_joined` does.

        Raises:
            Failure: the worker ended or hangs.
        """
        message = SEPARATOR.join(text.encode("utf-8") for text in texts)
        answer = self._worker().ask(message)
        return np.frombuffer(answer, "<u4")

    def close(self) -> None:
        """End the workers."""
        for worker in self._all:
            worker.close()

    def _worker(self) -> "Worker":
        if not hasattr(self._of_this_thread, "worker"):
            worker = Worker(self._tokenizer_json)
            self._all.append(worker)
            worker.answer()  # READY
            self._of_this_thread.worker = worker
        return self._of_this_thread.worker  # type: ignore[no-any-return]


class Worker:
    """One process, and the connection to it."""

    def __init__(self, tokenizer_json: Path) -> None:
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115, `close` closes it
        self._pipe, theirs = connection.Pipe()
        command = [sys.executable, "-m", "llm.prepare.workers", str(tokenizer_json), str(theirs.fileno())]
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": self._output, "stderr": self._output}
        try:
            with theirs:
                self.process = subprocess.Popen(command, env=child_environment(), **streams, **_inherit(theirs))
        except OSError as error:
            self._pipe.close()
            self._output.close()
            raise Failure(
                f"a tokenizer process cannot be started ({error.strerror}); end other programs, then prepare the text "
                "again"
            ) from None

    def ask(self, message: bytes) -> bytes:
        """Send a message and return the answer."""
        with contextlib.suppress(OSError):  # the process has ended: `answer` raises Failure
            self._pipe.send_bytes(message)
        return self.answer()

    def answer(self) -> bytes:
        """Return the next message.

        Raises:
            Failure: no message comes.
        """
        try:
            for _ in range(PATIENCE):  # not until a time: the clock goes on while both processes are stopped (Ctrl-Z)
                if self._pipe.poll(1):
                    return self._pipe.recv_bytes()
        except (OSError, EOFError):
            cause = f"a tokenizer process ended (exit code {self.process.wait()})"
        else:
            self.process.kill()
            cause = f"a tokenizer process gave no answer for {PATIENCE} s"
        raise Failure(f"{cause}{self._quote_output()}; {stand_in() or 'prepare the text again'}")

    def close(self) -> None:
        """Close the connection, which ends the process; kill it if it does not end."""
        self._pipe.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._output.close()

    def _quote_output(self) -> str:
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").split("\n")
        for line in reversed(lines):
            if line.strip():
                return f"; its last output: {line.strip()[:200]}"
        return ""


def _inherit(pipe: Any) -> dict[str, Any]:
    """Return the arguments of Popen that let the child use `pipe`."""
    if os.name == "nt":
        os.set_handle_inheritable(pipe.fileno(), True)  # type: ignore[attr-defined]
        return {"close_fds": False}
    return {"pass_fds": [pipe.fileno()]}


def encode_joined(tokenizer: Tokenizer, *texts: str) -> Ids:
    """Return the ids of `texts`, with end-of-text between them if the tokenizer has one."""
    parts = []
    for number, text in enumerate(texts):
        if number > 0 and tokenizer.end_of_text is not None:
            parts.append(np.array([tokenizer.end_of_text], np.uint32))
        parts.append(tokenizer.encode(text))
    return np.concatenate(parts)


def main(tokenizer_json: str, handle: str) -> None:
    """Serve as a worker on an inherited connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    # the class that `connection.Pipe` uses on this system
    pipe_class: Any = connection.PipeConnection if os.name == "nt" else connection.Connection  # type: ignore[attr-defined]
    with pipe_class(int(handle)) as pipe:
        tokenizer = load_tokenizer(Path(tokenizer_json))
        with contextlib.suppress(EOFError, ConnectionError):  # the parent closed the connection, or ended
            pipe.send_bytes(READY)
            while True:
                texts = pipe.recv_bytes().split(SEPARATOR)
                ids = encode_joined(tokenizer, *(text.decode("utf-8") for text in texts))
                pipe.send_bytes(ids.astype("<u4").tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
