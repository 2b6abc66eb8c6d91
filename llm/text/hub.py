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

# our name: the dataset's on the hub, and the part of it
TEXTS = {
    "tinystories": ("roneneldan/TinyStories", None),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
}


TEXT_LIMIT = 200_000_000  # characters: about 45 million tokens of GPT-2, some hours of a laptop


def fetch(name: str, limit: int | None, offline: bool, say: Callable[[str], None]) -> Path:
    """A file of rows with the first documents of the text, until they have `limit` characters (TEXT_LIMIT if None).

    It is in the cache, complete or absent; one that is there needs no network and no lock. Raises Failure where it
    cannot be had, and UserError where the package that does it is missing.
    """
    limit = limit or TEXT_LIMIT
    folder = storage.cache_folder() / name
    path = folder / f"first-{limit}.jsonl"
    if path.is_file():
        return path
    if offline:
        raise Failure(f"{name}: {path} is not there, and --offline was given; run once without it")
    with closing(_rows(name, path)) as texts:
        text = next(texts, "")  # what the network refuses, it refuses before anything is written
        if not text:
            raise Failure(f"{name}: the hub sent no text; try again later")
        storage.check_writable(folder, needed=limit + limit // 8)
        say(f"downloading the first {limit:,} characters of {name} into {path}, once")
        _spool(name, path, itertools.chain([text], texts), limit)
    return path


def _spool(name: str, path: Path, texts: Iterable[str], limit: int) -> None:
    try:
        with storage.locked(path.parent, "this part of the cache"), storage.writing(path) as file:
            taken = 0
            for text in texts:
                taken += len(text)
                file.write(json.dumps({FIELD: text}, ensure_ascii=False).encode("utf-8") + b"\n")
                if taken >= limit:
                    break
    except OSError as error:
        raise Failure(
            f"{name}: cannot be kept in {path.parent} ({error.strerror}); make room, or set LOSSCURVE_CACHE to another"
        ) from None


def _rows(name: str, path: Path) -> Generator[str, None, None]:
    """The texts as the hub sends them, empty ones left out. Raises Failure for whatever a network can do."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"{name}: comes from the Hugging Face hub through the datasets package; "
            "install it with: pip install 'losscurve[data]'"
        ) from None
    repository, part = TEXTS[name]
    try:
        if cause := download.unreachable(os.environ.get("HF_ENDPOINT") or "https://huggingface.co"):
            raise ConnectionError(cause)  # the package itself would try for 20 seconds and more
        for row in load_dataset(repository, part, split="train", streaming=True):
            if row[FIELD]:
                yield row[FIELD]
    except Exception as error:
        words = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise Failure(
            f"{name}: {path} is not there, and {repository} cannot be read from the Hugging Face hub ({words}); "
            "connect to the network, and run this again"
        ) from None
