"""Checks of what runs download: in the cache, or could be had."""

import hashlib
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from llm.checks.check import CACHE, Check, setting
from llm.errors import UserError


def text() -> Check:
    from llm import storage
    from llm.text import corpus

    path = storage.cache_folder() / "tinyshakespeare" / "input.txt"
    without = "runs without a --text take the text that Python carries"
    known = corpus.SHAKESPEARE_URL, path, corpus.SHAKESPEARE_SHA256
    return cached("text", "tiny Shakespeare", *known, setting("LOSSCURVE_CACHE", CACHE), without)


def vocabulary() -> Check:
    from llm import storage
    from llm.tokens import bpe

    own = os.environ.get("TIKTOKEN_CACHE_DIR")
    folder = Path(own) if own else storage.cache_folder() / "tiktoken"
    path = folder / hashlib.sha1(bpe.VOCAB_URL.encode()).hexdigest()
    remedy = "unset TIKTOKEN_CACHE_DIR" if own else setting("LOSSCURVE_CACHE", CACHE)
    without = "tokens are made from the text itself (bpe)"
    known = bpe.VOCAB_URL, path, bpe.VOCAB_SHA256
    return cached("vocabulary", "GPT-2's vocabulary", *known, remedy, without)


def cached(name: str, what: str, url: str, path: Path, sha256: str, remedy: str, without: str) -> Check:
    """Whether a download is in its cache or could be had: `remedy` is for a cache that cannot be written, `without`
    says what runs do without the download.
    """
    from llm import storage

    if path.is_file() and storage.sha256(path) == sha256:
        return Check(name, True, f"{what} is in {path.parent}")
    state = f"{what} {'is damaged' if path.is_file() else 'is not'} in {path.parent}"
    try:
        storage.check_writable(path.parent)
    except UserError as error:
        return Check(name, False, str(error), remedy)
    reason = silence(url)
    if reason is None:
        return Check(name, True, f"{state}; {urlsplit(url).netloc} answers, so it is fetched when it is needed")
    words = f"{state}, and {urlsplit(url).netloc} cannot be reached ({reason}): {without}"
    return Check(name, None, words, f'curl --create-dirs -o "{path}" {url}')


def silence(url: str) -> str | None:
    """Why nothing answers at `url`, within seconds; None if something does."""
    from llm.storage.download import CONNECT_SECONDS

    answer: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=CONNECT_SECONDS):
                answer.append(None)
        except Exception as error:  # whatever a network can do
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it holds the connection
            answer.append(str(getattr(error, "reason", None) or error) or type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)  # no timeout covers the look-up of the name
    thread.start()
    thread.join(CONNECT_SECONDS)
    return answer[0] if answer else f"no answer in {CONNECT_SECONDS:g} s"
