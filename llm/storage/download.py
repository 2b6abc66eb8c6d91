"""Download a file: it is verified before it takes its name, and an absent network is noticed within seconds."""

import hashlib
import queue
import threading
import urllib.error
import urllib.request
from pathlib import Path

from llm import storage
from llm.errors import Failure

CONNECT_SECONDS = 4.0  # until the server answers, including the DNS look-up

STALL_SECONDS = 15.0  # without a byte, once the server has answered

LIMIT = 64 * 2**20  # bytes; far above any file that we download


def fetch(url: str, path: Path, sha256: str, what: str, offline: bool = False) -> Path:
    """Return `path` once it holds the file with that SHA-256, which is downloaded from `url` if needed.

    A file that is there and verifies is neither locked nor written. `what` names the file in messages.

    Raises: Failure; within seconds if there is no network.
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
    except Exception as error:  # refused, unresolved, a proxy's page, a bad certificate, and more
        raise Failure(
            f"{what}: {path} {state}, and {url} cannot be reached ({describe(error)}); "
            "connect to the network, or put the file there"
        ) from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise Failure(f"{what}: {url} sent another file than the known one (SHA-256 differs); try again later")
    try:
        with storage.writing(path) as file:
            file.write(content)
    except OSError as error:
        raise Failure(
            f"{what}: cannot be saved in {path.parent} ({error.strerror}); set LOSSCURVE_CACHE to a folder of yours"
        ) from None
    return path


def unreachable(url: str) -> str:
    """Return within seconds why `url` does not answer, or "" if it answers, even with an HTTP error."""
    try:
        ask(url)
    except urllib.error.HTTPError:
        return ""
    except Exception as error:
        return describe(error)
    return ""


def ask(url: str) -> None:
    """Ask for `url` without its body. Raises: what `_get` raises, HTTPError for an error of the server."""
    _get(urllib.request.Request(url, method="HEAD"))


def _get(url: str | urllib.request.Request) -> bytes:
    """Return the body at `url`. Raises: what urllib raises; TimeoutError if nothing answers within CONNECT_SECONDS."""
    answers: queue.Queue[bytes | Exception | None] = queue.Queue()

    def download() -> None:
        try:
            with urllib.request.urlopen(url, timeout=STALL_SECONDS) as response:
                answers.put(None)  # connected
                answers.put(response.read(LIMIT))
        except Exception as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it holds the connection open
            answers.put(error)

    # Download in a thread, because no timeout of urllib covers the DNS look-up.
    threading.Thread(target=download, daemon=True).start()
    try:
        answer = answers.get(timeout=CONNECT_SECONDS) or answers.get()
    except queue.Empty:
        raise TimeoutError(f"no answer in {CONNECT_SECONDS:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer or b""


def describe(error: Exception) -> str:
    """Return why a download failed, in the words of the original error."""
    reason = getattr(error, "reason", None)  # URLError wraps the original error
    return str(reason or error) or type(error).__name__
