"""Text to token files: train.bin, val.bin, tokenizer.json, and meta.json, which describes the three.

The text is read twice and never held: once to count and check it, once to tokenize it, piece by piece
on all cores. The four files replace those of an earlier preparation together, or not at all.
"""

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm import corpus, storage
from llm.config import TrainConfig, from_settings
from llm.corpus import Corpus, Survey, look, span
from llm.cut import pieces
from llm.errors import Failure, UserError
from llm.tokenizer import BPE, BPE_VOCAB_SIZE, Bytes, Characters, Ids, Tokenizer, gpt2, save_tokenizer, train_bpe
from llm.workers import Workers

FORMAT, VERSION = "losscurve tokens", 1
FILES = ("train.bin", "val.bin", "meta.json", "tokenizer.json")
LARGE = 16 * 2**20  # characters from which processes are worth their start
SAMPLE = 64 * 2**20  # characters: a BPE is trained on no more than this, evenly spread over a larger text

Progress = Callable[[int, int], None]  # characters done, characters in all
Say = Callable[[str], None]  # a line for the person


def prepare(
    text: tuple[str, ...],
    data_dir: Path,
    tokenizer: str = "auto",
    vocab_size: int | None = None,
    val_fraction: float = 0.1,
    offline: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Say | None = None,
    block_size: int = 0,
    given: Tokenizer | None = None,
) -> dict[str, Any]:
    """Make the token files of `text` in `data_dir`, and return what meta.json holds.

    `text` as in `corpus.opened`, the rest as in `TrainConfig`; a tokenizer that is `given` (that of
    weights to start from) is used as it is. The training split has to hold a window of `block_size`
    tokens and the one after, where a size is given. Raises UserError before anything is written,
    among others where `data_dir` holds token files and `overwrite` is false; Failure if the work fails.
    """
    settings = _settings(text, tokenizer, vocab_size, val_fraction)
    say = say or (lambda line: None)
    _refuse_occupied(data_dir, overwrite)
    with corpus.opened(text, offline) as source:
        ready = given or _ready(tokenizer, source, offline, say)
        survey = look(source, alphabet=tokenizer == "char")
        names = ", ".join([document.label for document in source.documents][:3])
        cut = int(survey.total * (1 - val_fraction))
        if not survey.total:
            raise UserError(f"{names}: the text is empty; give some text")
        if not 0 < cut < survey.total:
            raise UserError(f"{names}: {survey.total} characters cannot be split for validation; give more text")
        if tokenizer == "char" and given is None:
            ready = Characters(survey.alphabet)
        if ready is None:
            if cut > SAMPLE:
                say(f"training the bpe on {SAMPLE / 1e6:.0f} of {cut / 1e6:.0f} M characters, evenly spread")
            ready = train_bpe(_sample(source, survey, cut), vocab_size or BPE_VOCAB_SIZE)
        if vocab_size is not None and vocab_size < ready.vocab_size:
            raise UserError(f"vocab_size = {vocab_size} is below the {ready.vocab_size} of {ready.kind}; leave it out")
        storage.check_writable(data_dir, needed=survey.bytes * (2 if ready.kind in ("byte", "char") else 1))
        try:
            with storage.locked(data_dir, "this token folder"):
                storage.recover(data_dir)
                _refuse_occupied(data_dir, overwrite)  # again: another process may have been here
                with storage.transaction(data_dir) as staging:
                    meta = _write(staging, source, survey, cut, ready, progress) | {"settings": settings}
                    for split, needed in (("train", block_size + 1), ("val", min(block_size, 1) + 1)):
                        if (found := meta["splits"][split]["tokens"]) < needed:
                            raise UserError(
                                f"{names}: {found} tokens to {split} on, and a window needs {needed}; "
                                f"give more text or a smaller --block_size"
                            )
                    storage.write_json(staging / "meta.json", meta)
        except OSError as error:
            raise Failure(f"{data_dir}: cannot write ({error.strerror}); make room, then run this again") from None
    return meta


def ensure(
    config: TrainConfig,
    offline: bool = False,
    progress: Progress | None = None,
    say: Say | None = None,
    given: Tokenizer | None = None,
) -> Path:
    """The folder of token files that `config` trains on, prepared now if need be.

    Without `text`: `data_dir`, which has to be there, or `data`, prepared from the default text if it is not.
    With `text`: `data_dir` or `data/NAME`, used again if it was made from that text with those settings.
    Raises UserError where the folder holds something else: nothing is overwritten.
    """
    folder = Path(config.data_dir or default_folder(config))
    if storage.unfinished(folder):
        with storage.locked(folder, "this token folder"):
            storage.recover(folder)
    if not any((folder / name).exists() for name in FILES):
        if config.data_dir and not config.text:
            raise UserError(
                f"data_dir = {config.data_dir}: no train.bin there; make it with losscurve prepare --data_dir, "
                "or name a text with --text"
            )
        settings = (config.tokenizer, config.vocab_size, config.val_fraction)
        block_size = config.model.block_size
        prepare(config.text, folder, *settings, offline, False, progress, say, block_size, given)
    elif not (folder / "train.bin").exists():
        raise UserError(f"{folder}: has no train.bin; prepare it again with --overwrite, or choose another --data_dir")
    elif config.text:
        _refuse_other(folder, config, offline)
    elif config.tokenizer != "auto":
        kind = _kind(folder)
        if kind != config.tokenizer:
            raise UserError(
                f"{folder} holds {kind} tokens, not {config.tokenizer}; choose another --data_dir, or name a --text"
            )
    return folder


def default_folder(config: TrainConfig) -> str:
    """`data`, or `data/NAME` for a text, with the tokenizer where one was chosen."""
    if not config.text:
        return "data"
    size = config.vocab_size if config.tokenizer == "bpe" and config.vocab_size else ""
    return f"data/{corpus.name_of(config.text)}" + (f"-{config.tokenizer}{size}" if config.tokenizer != "auto" else "")


def _settings(text: tuple[str, ...], tokenizer: str, vocab_size: int | None, val_fraction: float) -> dict[str, Any]:
    """What meta.json says was asked for. Raises UserError for a value out of its bounds."""
    from_settings({"tokenizer": tokenizer, "vocab_size": vocab_size, "val_fraction": val_fraction})
    if tokenizer == "bpe" and vocab_size is not None and vocab_size < 257:
        raise UserError(f"vocab_size = {vocab_size}: a bpe has the 256 bytes and end-of-text, so at least 257")
    return {"text": list(text), "tokenizer": tokenizer, "vocab_size": vocab_size, "val_fraction": val_fraction}


def _refuse_occupied(folder: Path, overwrite: bool) -> None:
    there = [name for name in FILES if (folder / name).exists()]
    if there and not overwrite:
        raise UserError(f"{folder} already holds {', '.join(there)}; add --overwrite, or choose another --data_dir")


def _refuse_other(folder: Path, config: TrainConfig, offline: bool) -> None:
    """UserError unless `folder` was made from the text of `config` with its settings."""
    remedy = "choose another --data_dir, or prepare it again with losscurve prepare --overwrite"
    if not (folder / "meta.json").exists():
        raise UserError(f"{folder} holds token files of another program; choose another --data_dir")
    meta = storage.read_json(folder / "meta.json")
    wanted = _settings(config.text, config.tokenizer, config.vocab_size, config.val_fraction)
    try:
        made, made_from = dict(meta["settings"]), meta["source"]
        if wanted["tokenizer"] not in ("auto", "bpe"):  # there it is a size for the model, not for the text
            wanted["vocab_size"] = made["vocab_size"]
        for name in ("tokenizer", "vocab_size", "val_fraction"):
            if made[name] != wanted[name]:
                raise UserError(f"{folder} was made with {name} = {made[name]}, not {wanted[name]}; {remedy}")
        if made["text"] == wanted["text"] == [corpus.SHAKESPEARE]:  # one known text, wherever its file went
            return
        with corpus.opened(config.text, offline) as source:
            if made["text"] == wanted["text"] and made_from["files"] == source.files():
                return
            if made_from["sha256"] == look(source).sha256 and len(made_from["files"]) == len(source.documents):
                return
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'meta.json'}: not one of ours ({error!r}); {remedy}") from None
    raise UserError(f"{folder} was made from another text, or from this one before it changed; {remedy}")


def _kind(folder: Path) -> str:
    """The kind of tokens in a folder; without meta.json, GPT-2's are assumed."""
    if not (folder / "meta.json").exists():
        return "gpt2"
    meta = storage.read_json(folder / "meta.json")
    try:
        return str(meta["tokenizer"]["kind"])
    except (KeyError, TypeError):
        raise UserError(f"{folder / 'meta.json'}: says no tokenizer; prepare it again with --overwrite") from None


def _ready(tokenizer: str, source: Corpus, offline: bool, say: Say) -> Tokenizer | None:
    """The tokenizer if it needs no text; None for one that has to be made from the text. Says a fallback."""
    if source.missing:
        chosen = "a bpe trained on it" if tokenizer == "auto" else f"{tokenizer} tokens"
        say(f"{source.missing}. Using the help topics that Python carries instead, with {chosen}")
        tokenizer = "bpe" if tokenizer == "auto" else tokenizer
    if tokenizer == "auto":
        try:
            return gpt2(offline)
        except Failure as failure:
            say(f"{failure}. Using a bpe trained on the text instead")
            return None
    if tokenizer == "gpt2":
        return gpt2(offline)
    return Bytes() if tokenizer == "byte" else None


def _sample(source: Corpus, survey: Survey, stop: int) -> Iterator[str]:
    """The training text, or about SAMPLE characters of it in evenly spread chunks."""
    share, taken = min(1.0, SAMPLE / stop), 0.0
    for _, chunks in span(source, survey, 0, stop):
        for chunk in chunks:
            taken += share
            if taken >= 1:
                taken -= 1
                yield chunk


def _write(
    staging: Path, source: Corpus, survey: Survey, cut: int, tokenizer: Tokenizer, progress: Progress | None
) -> dict[str, Any]:
    """train.bin, val.bin and tokenizer.json in `staging`; what meta.json has to say of them."""
    save_tokenizer(tokenizer, staging / "tokenizer.json")
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    used = np.zeros(tokenizer.vocab_size, dtype=bool)
    splits = {}
    with contextlib.ExitStack() as stack:
        encode = tokenizer.encode
        if isinstance(tokenizer, BPE) and survey.total > LARGE:
            workers = Workers(staging / "tokenizer.json")
            stack.callback(workers.close)
            encode = workers.encode
        for name, start, stop in (("train", 0, cut), ("val", cut, survey.total)):
            tick = None if progress is None else (lambda done, at=start: progress(at + done, survey.total))
            items = _items(source, survey, start, stop, tokenizer)
            splits[name] = _write_split(staging / f"{name}.bin", items, tokenizer, encode, dtype, used, tick)
    counted = [sum(split[what] for split in splits.values()) for what in ("characters", "bytes")]
    if counted != [survey.total, survey.bytes]:
        raise Failure(f"{source.name}: the text changed while it was read; prepare it again")
    return {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "sha256": storage.sha256(staging / "tokenizer.json"),
        },
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "max_id": max(split["max_id"] for split in splits.values()),
        "end_of_text": tokenizer.end_of_text,
        "vocab_used": int(used.sum()),
        "splits": splits,
        "source": {
            "name": source.name,
            "files": source.files(),
            "documents": sum(map(bool, survey.characters)),
            "bytes": survey.bytes,
            "characters": survey.total,
            "sha256": survey.sha256,
        },
    }


def _items(source: Corpus, survey: Survey, start: int, stop: int, tokenizer: Tokenizer) -> Iterator[str | None]:
    """The pieces of a split, with None where an end-of-text belongs: after each document but the last."""
    last = max(number for number, length in enumerate(survey.characters) if length)
    ends = np.cumsum(survey.characters)
    for number, chunks in span(source, survey, start, stop):
        yield from pieces(chunks) if isinstance(tokenizer, BPE) else chunks  # bytes and characters: cut anywhere
        if tokenizer.end_of_text is not None and number < last and ends[number] <= stop:
            yield None


def _write_split(
    path: Path,
    items: Iterator[str | None],
    tokenizer: Tokenizer,
    encode: Callable[[str], Ids],
    dtype: str,
    used: npt.NDArray[np.bool_],
    tick: Callable[[int], None] | None,
) -> dict[str, Any]:
    """Tokenize `items` into `path`, marking the `used` ids; what meta.json says of the split."""
    lengths = tokenizer.token_bytes()
    digest, tokens, size, characters, largest = hashlib.sha256(), 0, 0, 0, 0

    def encoded(item: str | None) -> tuple[Ids, int]:
        ids = np.array([tokenizer.end_of_text]) if item is None else encode(item)
        return ids.astype(np.dtype(dtype).newbyteorder("<"), copy=False), len(item or "")

    with open(path, "wb") as file:
        for found, item_characters in _in_order(encoded, items):
            for ids in np.split(found, range(2**20, len(found), 2**20)):  # indexing makes 64-bit copies
                content = ids.tobytes()
                file.write(content)
                digest.update(content)
                used[ids] = True
                size += int(lengths[ids].sum())
                largest = max(largest, int(ids.max(initial=0)))
            tokens += len(found)
            characters += item_characters
            if tick:
                tick(characters)
    info = path.stat()
    return {
        "file": path.name,
        "tokens": tokens,
        "bytes": size,
        "characters": characters,
        "max_id": largest,
        "size": info.st_size,
        "mtime_ns": info.st_mtime_ns,  # a rename keeps it
        "sha256": digest.hexdigest(),
    }


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
