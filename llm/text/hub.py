"""Larger texts by name, streamed from the Hugging Face hub into the cache once, as far as they are asked for."""

import itertools
import json
import os
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from pathlib import Path

from llm import storage
from llm.errors import Failure, UserError
from llm.storage import download
from llm.text.rows import FIELD

# our name for a text: the dataset on the hub, and its configuration
TEXTS = {
    "tinystories": ("roneneldan/TinyStories", None),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
}


TEXT_LIMIT = 200_000_000  # characters: about 45 million GPT-2 tokens, some hours of training on a laptop


def fetch(name: str, limit: int | None, offline: bool, say: Callable[[str], None]) -> Path:
    """Return a file of rows: the first documents of a text, until they have `limit` characters (default TEXT_LIMIT).

    The file is in the cache, complete or absent. If it is there already, this needs no network and no lock.

    Raises:
        Failure: the text cannot be downloaded, or the cache cannot be written.
        UserError: the datasets package is missing.
    """
    limit = limit or TEXT_LIMIT
    folder = storage.cache_folder() / name
    path = folder / f"first-{limit}.jsonl"
    if path.is_file():
        return path
    if offline:
        raise Failure(f"{name}: {path} is not there, and --offline was given; run once without --offline")
    with closing(_stream_texts(name, path)) as texts:
        first = next(texts, "")  # a network error is raised here, before anything is written
        if not first:
            raise Failure(f"{name}: the hub sent no text; try again later")
        storage.check_writable(folder, needed=limit + limit // 8)
        say(f"downloading the first {limit:,} characters of {name} into {path}, once")
        _write_rows(name, path, itertools.chain([first], texts), limit)
    return path


def _write_rows(name: str, path: Path, texts: Iterable[str], limit: int) -> None:
    try:
        with storage.locked(path.parent, "this part of the cache"), storage.writing(path) as file:
            characters = 0
            for text in texts:
                characters += len(text)
                file.write(json.dumps({FIELD: text}, ensure_ascii=False).encode("utf-8") + b"\n")
                if characters >= limit:
                    break
    except OSError as error:
        raise Failure(
            f"{name}: cannot write to {path.parent} ({error.strerror}); free disk space, or set LOSSCURVE_CACHE to "
            "another folder"
        ) from None


def _stream_texts(name: str, path: Path) -> Generator[str, None, None]:
    """Yield the texts that the hub sends, without empty ones. Raises Failure for any network error."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"{name}: comes from the Hugging Face hub through the datasets package; "
            "install it with: pip install 'losscurve[data]'"
        ) from None
    repository, configuration = TEXTS[name]
    try:
        cause = download.unreachable(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
        if cause:
            raise ConnectionError(cause)  # the datasets package would try for 20 seconds and more
        for row in load_dataset(repository, configuration, split="train", streaming=True):
            if row[FIELD]:
                yield row[FIELD]
    except Exception as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise Failure(
            f"{name}: {path} is not there, and {repository} cannot be read from the Hugging Face hub ({cause[:200]}); "
            "connect to the network, then run this again"
        ) from None
