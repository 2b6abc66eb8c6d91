"""A file from the network: verified before it takes its name, and never a long wait where there is no network."""

import hashlib
import queue
import threading
import urllib.error
import urllib.request
from pathlib import Path

from llm import storage
from llm.errors import Failure

CONNECT_SECONDS = 4.0  # until the server answers, name look-up included


STALL_SECONDS = 15.0  # without a byte, once it has answered


LIMIT = 64 * 2**20  # bytes; far above anything we fetch


def fetch(url: str, path: Path, sha256: str, what: str, offline: bool = False) -> Path:
    """`path`, holding the file with that SHA-256: as it is there, or downloaded from `url`.

    A file that is there and verifies is neither locked nor written. `what` names the file in messages.
    Raises Failure, within seconds where there is no network.
    """
    try:
        if path.is_file() and storage.sha256(path) == sha256:
            return path
        state = "is damaged" if path.is_file() else "is not there"
    except OSError as error:
        state = f"cannot be read ({error.strerror})"
    if offline:
        raise Failure(f"{what}: {path} {state}, and --offline was given; run once without it, or put the file there")
    try:
        content = _get(url)
    except Exception as error:  # whatever a network can do: refused, unresolved, a proxy's page, a bad certificate
        raise Failure(
            f"{what}: {path} {state}, and {url} cannot be reached ({_cause(error)}); "
            "connect to the network, or put the file there"
        ) from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise Failure(f"{what}: what {url} sent is not the known file (SHA-256 differs); try again later")
    try:
        with storage.writing(path) as file:
            file.write(content)
    except OSError as error:
        raise Failure(
            f"{what}: cannot be kept in {path.parent} ({error.strerror}); set LOSSCURVE_CACHE to a folder of yours"
        ) from None
    return path


def unreachable(url: str) -> str:
    """Why nothing answers at `url`, known within seconds; empty where something does, be it an error."""
    try:
        _get(url)
    except urllib.error.HTTPError:
        return ""
    except Exception as error:
        return _cause(error)
    return ""


def _get(url: str) -> bytes:
    """The body at `url`. Raises what urllib raises, and TimeoutError if nothing answers in CONNECT_SECONDS."""
    answers: queue.Queue[bytes | Exception | None] = queue.Queue()

    def work() -> None:
        try:
            with urllib.request.urlopen(url, timeout=STALL_SECONDS) as response:
                answers.put(None)
                answers.put(response.read(LIMIT))
        except Exception as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it holds the connection
            answers.put(error)

    # a thread of its own, because no timeout of urllib covers the look-up of the name
    threading.Thread(target=work, daemon=True).start()
    try:
        answer = answers.get(timeout=CONNECT_SECONDS) or answers.get()
    except queue.Empty:
        raise TimeoutError(f"no answer in {CONNECT_SECONDS:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer or b""


def _cause(error: Exception) -> str:
    reason = getattr(error, "reason", None)  # URLError wraps what happened
    return str(reason or error) or type(error).__name__
