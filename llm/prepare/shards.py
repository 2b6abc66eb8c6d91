"""Write the token files of a split: shards of bounded size, each complete or absent, on all cores.

Text is cut only where that changes no id, and every shard of a split but the last has the same number of tokens. So a
preparation that resumes at a shard writes what an uninterrupted one would have written.

Shapes: `V` vocabulary.
"""

import contextlib
import hashlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm import storage
from llm.errors import Failure, UserError
from llm.machine.processors import cores
from llm.prepare.journal import Journal, Shard
from llm.prepare.workers import Workers, encode_joined
from llm.text.corpus import Corpus, Survey, documents_between
from llm.tokens import cut
from llm.tokens.bpe import BPE
from llm.tokens.huggingface import HuggingFace
from llm.tokens.scan import iterate_chunks
from llm.tokens.token_files import SPLITS, shard_name
from llm.tokens.tokenizer import Ids, Tokenizer

SHARD_TOKENS = 2**27  # 256 MiB of uint16


LARGE = 16 * 2**20  # characters of a text that is worth the start of worker processes


AT_ONCE = 2**20  # tokens counted and written together: indexing makes 64-bit copies


Progress = Callable[[int, int], None]  # characters done, characters in all


Place = list[int]  # a character of the text, and a token of the batch that begins there


@dataclass(frozen=True)
class ShardWriter:
    """Writes the shards of one split after another, and collects which ids are in use."""

    limit: int  # tokens of a shard
    token_bytes: npt.NDArray[np.int64]  # (V,) bytes of text of each token
    used: npt.NDArray[np.bool_]  # (V,) whether an id is in use

    def mark_used(self, path: Path, dtype: np.dtype[Any]) -> None:
        """Collect the ids of a shard that an interrupted preparation wrote."""
        for _, ids in iterate_chunks(np.memmap(path, dtype, "r"), AT_ONCE):
            self.used[ids] = True

    def write(self, path: Path, stream: Iterator[tuple[Ids, Place]]) -> Shard | None:
        """Write the next `limit` tokens of `stream`, or the rest of it; return None if nothing is left."""
        part = next(stream, None)
        if part is None:
            return None
        digest = hashlib.sha256()
        tokens = 0
        text_bytes = 0
        largest = 0
        with storage.writing(path) as file:
            while part is not None:
                ids, place = part
                content = ids.tobytes()
                file.write(content)
                digest.update(content)
                self.used[ids] = True
                text_bytes += int(self.token_bytes[ids].sum())
                largest = max(largest, int(ids.max()))
                tokens += len(ids)
                part = next(stream, None) if tokens < self.limit else None
        return {
            "tokens": tokens,
            "bytes": text_bytes,
            "max_id": largest,
            "sha256": digest.hexdigest(),
            "next": place,
        }


def write_splits(
    folder: Path,
    source: Corpus,
    survey: Survey,
    train_characters: int,
    journal: Journal,
    shard_tokens: int,
    progress: Progress | None,
) -> tuple[dict[str, dict[str, Any]], int]:
    """Write the training split (the first `train_characters`) and the validation split (the rest) into `folder`.

    `folder` holds `tokenizer.json` and the shards of `journal` already. Return (the description of each split for
    meta.json, the number of ids in use).

    Raises:
        UserError: the tokenizer was given, and cannot encode a character of the text.
        Failure: the text has changed since it was surveyed.
    """
    tokenizer = journal.tokenizer
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    used = np.zeros(tokenizer.vocab_size, dtype=bool)
    writer = ShardWriter(shard_tokens, tokenizer.token_bytes(), used)

    def tick(characters_done: int) -> None:
        if progress:
            progress(characters_done, survey.total)

    with _encoder(folder, tokenizer, survey) as encode:

        def encode_batch(texts: list[str]) -> tuple[Ids, int]:
            try:
                ids = encode(*texts).astype(dtype, copy=False)
            except UserError as error:  # a tokenizer of other weights: one that was made for the text knows all of it
                cause = str(error).partition(";")[0]
                raise UserError(
                    f"{source.name}: {cause}; remove it, or leave out the weights and teachers that have this tokenizer"
                ) from None
            return ids, sum(map(len, texts))

        for split, start, stop in (("train", 0, train_characters), ("val", train_characters, survey.total)):
            finished = journal.shards_of(split)
            for number in range(len(finished)):
                writer.mark_used(folder / shard_name(split, number), dtype)
            begin, skip = finished[-1]["next"] if finished else (start, 0)
            batches = _text_batches(source, survey, begin, stop, tokenizer)
            encoded = _map_in_order(encode_batch, batches)
            stream = _cut_at_shards(encoded, begin, skip, shard_tokens, tick)
            for number in itertools.count(len(finished)):
                shard = writer.write(folder / shard_name(split, number), stream)
                if shard is None:
                    break
                journal.add({"split": split} | shard)
    _check_whole_text(source, survey, train_characters, journal, tokenizer.is_lossless)
    characters = {"train": train_characters, "val": survey.total - train_characters}
    splits = {}
    for split in SPLITS:
        splits[split] = _describe_split(folder, split, journal.shards_of(split), characters[split])
    return splits, int(used.sum())


@contextlib.contextmanager
def _encoder(folder: Path, tokenizer: Tokenizer, survey: Survey) -> Iterator[Callable[..., Ids]]:
    """Yield the function that encodes texts: in worker processes for the BPE of a large text."""
    if not isinstance(tokenizer, (BPE, HuggingFace)) or survey.total <= LARGE:
        yield partial(encode_joined, tokenizer)
        return
    workers = Workers(folder / "tokenizer.json")
    try:
        yield workers.encode
    finally:
        workers.close()


def _check_whole_text(
    source: Corpus, survey: Survey, train_characters: int, journal: Journal, is_lossless: bool
) -> None:
    """Raise Failure if the shards do not hold the text that was surveyed.

    The bytes of the tokens of a tokenizer that is not lossless are not those of the text, so they are not compared.
    """
    ends = []
    for split in SPLITS:
        shards = journal.shards_of(split)
        ends.append(shards[-1]["next"] if shards else [0, 0])
    text_bytes = sum(shard["bytes"] for shard in journal.shards)
    if ends != [[train_characters, 0], [survey.total, 0]] or (is_lossless and text_bytes != survey.bytes):
        raise Failure(f"{source.name}: the text changed while it was read; prepare it again")


def _text_batches(source: Corpus, survey: Survey, start: int, stop: int, tokenizer: Tokenizer) -> Iterator[list[str]]:
    """Yield the text from `start` to `stop` in batches of texts, each batch to be tokenized by itself.

    End-of-text belongs between two texts of a batch. The one after a document is in the batch with the document's
    end: the last text of a batch may be empty, the first is not. There is none after the last document of all.
    """
    texts = [""]
    size = 0  # characters of the batch
    for end, chunks in documents_between(source, survey, start, stop):
        # text may be cut anywhere for tokenizers by byte and by character
        pieces = cut.pieces(chunks) if isinstance(tokenizer, (BPE, HuggingFace)) else chunks
        for piece in pieces:
            if size >= cut.PIECE:
                yield texts
                texts = [""]
                size = 0
            texts[-1] += piece
            size += len(piece)
        if end <= stop and end < survey.total:
            texts.append("")
    if size:
        yield texts


def _cut_at_shards(
    encoded: Iterator[tuple[Ids, int]], begin: int, skip: int, limit: int, tick: Callable[[int], None]
) -> Iterator[tuple[Ids, Place]]:
    """Yield the ids of batches in arrays that do not reach over the end of a shard, each with the place after it.

    A batch comes with its number of characters. The first begins at the character `begin` of the text. The first
    `skip` of its tokens are left out: the shard before has them.
    """
    tokens = 0
    for ids, characters in encoded:
        at = min(skip, len(ids))
        skip -= at
        while at < len(ids):
            left_in_shard = limit - tokens % limit
            stop = min(at + AT_ONCE, at + left_in_shard, len(ids))
            tokens += stop - at
            is_end_of_batch = stop == len(ids)
            yield ids[at:stop], [begin + characters, 0] if is_end_of_batch else [begin, stop]
            at = stop
        begin += characters
        tick(begin)


def _describe_split(folder: Path, split: str, shards: list[Shard], characters: int) -> dict[str, Any]:
    """Return the description of a split for meta.json; a single shard is renamed to the name of a whole split."""
    files = []
    for number, shard in enumerate(shards):
        path = folder / shard_name(split, number)
        if len(shards) == 1:
            whole = folder / f"{split}.bin"
            os.replace(path, whole)
            path = whole
        info = path.stat()
        files.append(
            {
                "file": path.name,
                "tokens": shard["tokens"],
                "max_id": shard["max_id"],
                "size": info.st_size,
                "mtime_ns": info.st_mtime_ns,  # a rename keeps it
                "sha256": shard["sha256"],
            }
        )
    totals = {
        "tokens": sum(shard["tokens"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "characters": characters,
        "max_id": max(shard["max_id"] for shard in shards),
        "size": sum(file["size"] for file in files),
    }
    if len(files) > 1:
        return {**totals, "shards": files}
    only = files[0]
    return {"file": only["file"], **totals, "mtime_ns": only["mtime_ns"], "sha256": only["sha256"]}


def _map_in_order(work: Callable[[Any], Any], items: Iterator[Any]) -> Iterator[Any]:
    """Yield `work` of each item in order, computed on all cores of this process, with few items in flight.

    Threads suffice, because a tokenizer releases the interpreter lock.
    """
    workers = cores()
    pending: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
