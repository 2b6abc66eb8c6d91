"""Text to the token files of a split: shards of bounded size, each complete or absent, on all cores.

Text is cut only where that changes no id, and every shard of a split but the last has the same number of tokens. So a
preparation that goes on at some shard writes what an undisturbed one would have written.
"""

import contextlib
import hashlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm import storage
from llm.errors import Failure
from llm.text.corpus import Corpus, Survey, span
from llm.tokens import cut
from llm.tokens.bpe import BPE
from llm.tokens.journal import Journal, Shard
from llm.tokens.token_files import shard_name, stretches
from llm.tokens.tokenizer import Ids, Tokenizer
from llm.tokens.workers import Workers, joined

SHARD_TOKENS = 2**27  # 256 MiB of uint16


LARGE = 16 * 2**20  # characters from which processes are worth their start


AT_ONCE = 2**20  # tokens counted and written together: indexing makes 64-bit copies


Progress = Callable[[int, int], None]  # characters done, characters in all


Place = list[int]  # a character of the text, and a token of what starts there


def write_splits(
    folder: Path, source: Corpus, survey: Survey, at: int, journal: Journal, limit: int, progress: Progress | None
) -> tuple[dict[str, dict[str, Any]], int]:
    """Write the training split (the text up to the character `at`) and the validation split into `folder`, where
    `tokenizer.json` and the shards of `journal` are. What meta.json has to say of each, and how many ids are in use.

    Raises Failure where the text is not the one surveyed any more.
    """
    tokenizer = journal.tokenizer
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    lengths, used = tokenizer.token_bytes(), np.zeros(tokenizer.vocab_size, dtype=bool)
    tick = progress or (lambda done, total: None)
    with contextlib.ExitStack() as stack:
        encode: Callable[..., Ids] = partial(joined, tokenizer)
        if isinstance(tokenizer, BPE) and survey.total > LARGE:
            workers = Workers(folder / "tokenizer.json")
            stack.callback(workers.close)
            encode = workers.encode

        def encoded(texts: list[str]) -> tuple[Ids, int]:
            return encode(*texts).astype(dtype, copy=False), sum(map(len, texts))

        for split, start, stop in (("train", 0, at), ("val", at, survey.total)):
            done = journal.of(split)
            for number in range(len(done)):
                for _, ids in stretches(np.memmap(folder / shard_name(split, number), dtype, "r"), AT_ONCE):
                    used[ids] = True
            begin, skip = done[-1]["next"] if done else (start, 0)
            found = _in_order(encoded, _batches(source, survey, begin, stop, tokenizer))
            stream = _stream(found, begin, skip, limit, lambda place: tick(place, survey.total))
            for number in itertools.count(len(done)):
                shard = _write_shard(folder / shard_name(split, number), stream, limit, lengths, used)
                if shard is None:
                    break
                journal.add({"split": split} | shard)
    ends = {split: journal.of(split)[-1]["next"] if journal.of(split) else [0, 0] for split in ("train", "val")}
    sizes = sum(shard["bytes"] for shard in journal.shards)
    if ends != {"train": [at, 0], "val": [survey.total, 0]} or sizes != survey.bytes:
        raise Failure(f"{source.name}: the text changed while it was read; prepare it again")
    characters = {"train": at, "val": survey.total - at}
    splits = {split: _entry(folder, split, journal.of(split), characters[split]) for split in characters}
    return splits, int(used.sum())


def _batches(source: Corpus, survey: Survey, start: int, stop: int, tokenizer: Tokenizer) -> Iterator[list[str]]:
    """The text from `start` to `stop` in batches that can be tokenized each by itself: texts with an end-of-text
    between each two. That of a document's end stands in the batch with its end: the last text may be empty, the
    first is not. After the last document of all there is none.
    """
    texts, size = [""], 0
    for end, chunks in span(source, survey, start, stop):
        for piece in cut.pieces(chunks) if isinstance(tokenizer, BPE) else chunks:  # bytes and characters: cut anywhere
            if size >= cut.PIECE:
                yield texts
                texts, size = [""], 0
            texts[-1] += piece
            size += len(piece)
        if end <= stop and end < survey.total:
            texts.append("")
    if size:
        yield texts


def _stream(
    found: Iterator[tuple[Ids, int]], begin: int, skip: int, limit: int, tick: Callable[[int], None]
) -> Iterator[tuple[Ids, Place]]:
    """The ids of batches (each with its characters) in arrays of which none reaches over the end of a shard, each with
    the place behind it. The first batch begins at the character `begin`, and `skip` of its tokens are left out: there
    a shard begins."""
    tokens = 0
    for ids, characters in found:
        at = min(skip, len(ids))
        skip -= at
        while at < len(ids):
            stop = min(at + AT_ONCE, at + limit - tokens % limit, len(ids))
            tokens += stop - at
            yield ids[at:stop], [begin, stop] if stop < len(ids) else [begin + characters, 0]
            at = stop
        begin += characters
        tick(begin)


def _write_shard(
    path: Path,
    stream: Iterator[tuple[Ids, Place]],
    limit: int,
    lengths: npt.NDArray[np.int64],
    used: npt.NDArray[np.bool_],
) -> Shard | None:
    """The next `limit` tokens of `stream`, or what is left of it, in `path`, marking the `used` ids; None if nothing
    is left."""
    part = next(stream, None)
    if part is None:
        return None
    digest, tokens, size, largest = hashlib.sha256(), 0, 0, 0
    with storage.writing(path) as file:
        while part is not None:
            ids, place = part
            content = ids.tobytes()
            file.write(content)
            digest.update(content)
            used[ids] = True
            size += int(lengths[ids].sum())
            largest = max(largest, int(ids.max()))
            tokens += len(ids)
            part = next(stream, None) if tokens < limit else None
    return {"tokens": tokens, "bytes": size, "max_id": largest, "sha256": digest.hexdigest(), "next": place}


def _entry(folder: Path, split: str, shards: list[Shard], characters: int) -> dict[str, Any]:
    """What meta.json says of a split; a single shard gets the name of a whole."""
    files = []
    for number, shard in enumerate(shards):
        path = folder / shard_name(split, number)
        if len(shards) == 1:
            os.replace(path, folder / f"{split}.bin")
            path = folder / f"{split}.bin"
        info = path.stat()
        stamp = {"size": info.st_size, "mtime_ns": info.st_mtime_ns}  # a rename keeps it
        files.append({"file": path.name, "tokens": shard["tokens"], "max_id": shard["max_id"]} | stamp)
        files[-1]["sha256"] = shard["sha256"]
    whole = {
        "tokens": sum(shard["tokens"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "characters": characters,
        "max_id": max(shard["max_id"] for shard in shards),
        "size": sum(file["size"] for file in files),
    }
    if len(files) > 1:
        return whole | {"shards": files}
    return {"file": files[0]["file"]} | whole | {key: files[0][key] for key in ("mtime_ns", "sha256")}


def _in_order(work: Callable[[Any], Any], items: Iterator[Any]) -> Iterator[Any]:
    """`work` of each item in order, on all cores (a tokenizer lets go of the interpreter), few in flight."""
    workers = os.cpu_count() or 1
    waiting: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
