"""Checks of downloads: whether they are in the cache, or can be downloaded."""

import hashlib
import os
from pathlib import Path
from urllib.parse import urlsplit

from llm.checks.check import CACHE, Check, set_variable
from llm.errors import UserError


def text() -> Check:
    """Check the default text, tiny Shakespeare."""
    from llm import storage
    from llm.text import corpus

    return cached(
        "text",
        "tiny Shakespeare",
        corpus.SHAKESPEARE_URL,
        storage.cache_folder() / "tinyshakespeare" / "input.txt",
        corpus.SHAKESPEARE_SHA256,
        remedy=set_variable("LOSSCURVE_CACHE", CACHE),
        fallback="runs without a --text use the help topics that Python carries",
    )


def vocabulary() -> Check:
    """Check GPT-2's vocabulary."""
    from llm import storage
    from llm.tokens import bpe

    own_folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    folder = Path(own_folder) if own_folder else storage.cache_folder() / "tiktoken"
    return cached(
        "vocabulary",
        "GPT-2's vocabulary",
        bpe.VOCAB_URL,
        folder / hashlib.sha1(bpe.VOCAB_URL.encode()).hexdigest(),
        bpe.VOCAB_SHA256,
        remedy="unset TIKTOKEN_CACHE_DIR" if own_folder else set_variable("LOSSCURVE_CACHE", CACHE),
        fallback="runs train a bpe tokenizer on the text itself",
    )


def cached(name: str, what: str, url: str, path: Path, sha256: str, remedy: str, fallback: str) -> Check:
    """Check whether a download is in its cache at `path`, or can be downloaded.

    Args:
        remedy: the command for a cache that cannot be written
        fallback: what runs do without the download, in words
    """
    from llm import storage

    if path.is_file() and storage.sha256(path) == sha256:
        return Check(name, True, f"{what} is in {path.parent}")
    state = f"{what} {'is damaged' if path.is_file() else 'is not'} in {path.parent}"
    try:
        storage.check_writable(path.parent)
    except UserError as error:
        return Check(name, False, str(error), remedy)
    host = urlsplit(url).netloc
    reason = connection_error(url)
    if reason is None:
        return Check(name, True, f"{state}; {host} answers, so a run downloads it when it needs it")
    message = f"{state}, and {host} cannot be reached ({reason}): {fallback}"
    return Check(name, None, message, f'curl --create-dirs -o "{path}" {url}')


def connection_error(url: str) -> str | None:
    """Return why `url` cannot be downloaded, within seconds; None if the server has it."""
    from llm.storage import download

    try:
        download.ask(url)
    except Exception as error:  # urllib, ssl and http raise many kinds
        return download.describe(error)
    return None
