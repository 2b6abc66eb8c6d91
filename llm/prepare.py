"""Text to a folder of token files, with tokenizer.json, and meta.json, which describes them.

The text is read twice and never held: once to count and check it, once to tokenize it, piece by piece on all cores.
The files replace those of an earlier preparation together, or not at all; that of a text of several shards goes on
where it was interrupted.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llm import corpus, hub, journal, storage
from llm.config import TrainConfig, from_settings
from llm.corpus import Corpus, Survey, look, span
from llm.errors import Failure, UserError
from llm.journal import Journal, Key
from llm.rows import FIELD
from llm.shards import SHARD_TOKENS, Progress, write_splits
from llm.tokenizer import BPE_VOCAB_SIZE, Bytes, Characters, Tokenizer, gpt2, save_tokenizer, train_bpe
from llm.tokens import has_tokens, settle, token_files

FORMAT, VERSION = "losscurve tokens", 1
FILES = ("train.bin", "val.bin", "meta.json", "tokenizer.json")
SAMPLE = 64 * 2**20  # characters: a BPE is trained on no more than this, evenly spread over a larger text

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
    text_limit: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    text_field: str | None = None,
) -> dict[str, Any]:
    """Make the token files of `text` in `data_dir`, and return what meta.json holds.

    `text` as in `corpus.opened`, the rest as in `TrainConfig`; a tokenizer that is `given` (that of
    weights to start from) is used as it is. A split of more than `shard_tokens` tokens is written in shards of
    so many. The training split has to hold a window of `block_size` tokens and the one after, where a size is
    given. Raises UserError before anything is written, among others where `data_dir` holds token files and
    `overwrite` is false; Failure if the work fails.
    """
    settings = _settings(text, tokenizer, vocab_size, val_fraction, text_limit, text_field)
    if shard_tokens < 1:
        raise UserError(f"shard_tokens = {shard_tokens}: expected at least 1")
    say = say or (lambda line: None)
    _refuse_occupied(data_dir, overwrite)
    with corpus.opened(text, offline, text_limit, say, text_field) as source:
        ready = given or _ready(tokenizer, source, offline, say)
        survey = look(source, alphabet=tokenizer == "char")
        for notice in survey.notices:
            say(notice)
        names = ", ".join([file.label for file in source.files][:3])
        cut = int(survey.total * (1 - val_fraction))
        if not survey.total:
            raise UserError(f"{names}: the text is empty; give some text")
        if not 0 < cut < survey.total:
            raise UserError(f"{names}: {survey.total} characters cannot be split for validation; give more text")
        if tokenizer == "char" and given is None:
            ready = Characters(survey.alphabet)
        key = _key(settings, survey, given, shard_tokens)
        long = survey.bytes + survey.documents > shard_tokens  # no tokenizer makes more tokens than that
        ready = (journal.tokenizer_of(data_dir, key) if long else None) or ready
        if ready is None:
            if cut > SAMPLE:
                say(f"training the bpe on {SAMPLE / 1e6:.0f} of {cut / 1e6:.0f} M characters, evenly spread")
            ready = train_bpe(_sample(source, survey, cut), vocab_size or BPE_VOCAB_SIZE)
        if vocab_size is not None and vocab_size < ready.vocab_size:
            raise UserError(f"vocab_size = {vocab_size} is below the {ready.vocab_size} of {ready.kind}; leave it out")
        needed = survey.bytes * (2 if ready.kind in ("byte", "char") else 1)
        storage.check_writable(data_dir, needed=max(0, needed - journal.held(data_dir)))
        try:
            with storage.locked(data_dir, "this token folder"):
                storage.recover(data_dir)
                _refuse_occupied(data_dir, overwrite)  # again: another process may have been here
                taken_up = _taken_up(data_dir, key, ready, say) if long else None
                done = Journal(data_dir if long else None, key, ready, taken_up or [])
                if taken_up is None and journal.discard(data_dir):
                    say(f"{data_dir}: an unfinished preparation of other text or settings is dropped")
                with storage.transaction(data_dir, keep=long) as staging:
                    meta = _write(staging, source, survey, cut, done, shard_tokens, progress) | {"settings": settings}
                    for split, needed in (("train", block_size + 1), ("val", min(block_size, 1) + 1)):
                        if (found := meta["splits"][split]["tokens"]) < needed:
                            raise UserError(
                                f"{names}: {found} tokens to {split} on, and a window needs {needed}; "
                                f"give more text or a smaller --block_size"
                            )
                    storage.write_json(staging / "meta.json", meta)
                journal.discard(data_dir)
                settle(data_dir)  # shards of the earlier preparation that this one has no name for
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
            settle(folder)
    if not files_there(folder):
        if config.data_dir and not config.text:
            raise UserError(
                f"data_dir = {config.data_dir}: no train.bin there; make it with losscurve prepare --data_dir, "
                "or name a text with --text"
            )
        settings = (config.tokenizer, config.vocab_size, config.val_fraction)
        block_size = config.model.block_size
        limit, field = config.text_limit, config.text_field
        prepare(
            config.text, folder, *settings, offline, False, progress, say, block_size, given, limit, text_field=field
        )
    elif not has_tokens(folder):
        raise UserError(f"{folder}: has no train.bin; prepare it again with --overwrite, or choose another --data_dir")
    elif config.text:
        _refuse_other(folder, config, offline, say or (lambda line: None))
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


def _settings(
    text: tuple[str, ...],
    tokenizer: str,
    vocab_size: int | None,
    val_fraction: float,
    text_limit: int | None,
    text_field: str | None,
) -> dict[str, Any]:
    """What meta.json says was asked for. Raises UserError for a value out of its bounds."""
    wanted = {"tokenizer": tokenizer, "vocab_size": vocab_size, "val_fraction": val_fraction}
    from_settings(wanted | {"text_limit": text_limit, "text_field": text_field})
    if text_field not in (None, FIELD):  # so that a meta.json from before there was this setting says the same
        wanted["text_field"] = text_field
    if tokenizer == "bpe" and vocab_size is not None and vocab_size < 257:
        raise UserError(f"vocab_size = {vocab_size}: a bpe has the 256 bytes and end-of-text, so at least 257")
    if text_limit is None:
        return {"text": list(text)} | wanted
    if not any(word in hub.TEXTS for word in text):
        raise UserError(f"text_limit = {text_limit}: is for {' and '.join(hub.TEXTS)}; other texts are taken whole")
    return {"text": list(text)} | wanted | {"text_limit": text_limit}


def _key(settings: dict[str, Any], survey: Survey, given: Tokenizer | None, shard_tokens: int) -> Key:
    """What has to be the same where an interrupted preparation is taken up."""
    ends = hashlib.sha256(repr(survey.characters).encode()).hexdigest()  # of files: there an end-of-text may stand
    tokens = hashlib.sha256(repr(given and given.to_json()).encode()).hexdigest()
    text = {"sha256": survey.sha256, "ends": ends}
    return {"version": VERSION, "settings": settings, "text": text, "given": tokens, "shard_tokens": shard_tokens}


def files_there(folder: Path) -> list[str]:
    """The names of what a preparation makes, as far as they are in `folder`."""
    return sorted({name for name in FILES if (folder / name).exists()} | set(token_files(folder)))


def _taken_up(folder: Path, key: Key, tokenizer: Tokenizer, say: Say) -> list[journal.Shard] | None:
    """The shards to go on from, said in a line; None where no such preparation was begun."""
    shards = journal.shards_of(folder, key, tokenizer)
    if shards:
        tokens = sum(shard["tokens"] for shard in shards)
        say(f"{folder}: going on with an interrupted preparation; {len(shards)} shards ({tokens:,} tokens) are done")
    return shards


def _refuse_occupied(folder: Path, overwrite: bool) -> None:
    there = files_there(folder)
    if there and not overwrite:
        few = [*there[:4], f"{len(there) - 4} more"] if len(there) > 5 else there
        raise UserError(f"{folder} already holds {', '.join(few)}; add --overwrite, or choose another --data_dir")


def _refuse_other(folder: Path, config: TrainConfig, offline: bool, say: Say) -> None:
    """UserError unless `folder` was made from the text of `config` with its settings."""
    remedy = "choose another --data_dir, or prepare it again with losscurve prepare --overwrite"
    if not (folder / "meta.json").exists():
        raise UserError(f"{folder} holds token files of another program; choose another --data_dir")
    meta = storage.read_json(folder / "meta.json")
    wanted = _settings(
        config.text, config.tokenizer, config.vocab_size, config.val_fraction, config.text_limit, config.text_field
    )
    try:
        made, made_from = dict(meta["settings"]), meta["source"]
        if wanted["tokenizer"] not in ("auto", "bpe"):  # there it is a size for the model, not for the text
            wanted["vocab_size"] = made["vocab_size"]
        for name in ("tokenizer", "vocab_size", "val_fraction", "text_limit", "text_field"):
            optional = name in ("text_limit", "text_field")
            before, now = made.get(name) if optional else made[name], wanted.get(name)
            if before != now:
                raise UserError(f"{folder} was made with {name} = {before}, not {now}; {remedy}")
        if made["text"] == wanted["text"] == [corpus.SHAKESPEARE]:  # one known text, wherever its file went
            return
        with corpus.opened(config.text, offline, config.text_limit, say, config.text_field) as source:
            if made["text"] == wanted["text"] and made_from["files"] == source.stamps():
                return
            if made_from["sha256"] == look(source).sha256 and len(made_from["files"]) == len(source.files):
                return
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'meta.json'}: not one of ours ({error!r}); {remedy}") from None
    raise UserError(f"{folder} was made from another text, or from this one before it changed; {remedy}")


def _kind(folder: Path) -> str:
    """The kind of tokens in a folder; without meta.json, characters or GPT-2's (`tokens.vocabulary_of`)."""
    if not (folder / "meta.json").exists():
        return "char" if (folder / "meta.pkl").exists() else "gpt2"
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
    staging: Path, source: Corpus, survey: Survey, cut: int, journal: Journal, limit: int, progress: Progress | None
) -> dict[str, Any]:
    """The token files and tokenizer.json in `staging`, and nothing else; what meta.json has to say of them."""
    tokenizer = journal.tokenizer
    save_tokenizer(tokenizer, staging / "tokenizer.json")
    journal.write()
    splits, used = write_splits(staging, source, survey, cut, journal, limit, progress)
    named = {file["file"] for split in splits.values() for file in split.get("shards", [split])}
    for path in staging.iterdir():
        if path.name not in named | {"tokenizer.json"}:
            path.unlink()
    return {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "sha256": storage.sha256(staging / "tokenizer.json"),
        },
        "dtype": "uint16" if tokenizer.vocab_size <= 2**16 else "uint32",
        "vocab_size": tokenizer.vocab_size,
        "max_id": max(split["max_id"] for split in splits.values()),
        "end_of_text": tokenizer.end_of_text,
        "vocab_used": used,
        "splits": splits,
        "source": {
            "name": source.name,
            "files": source.stamps(),
            "documents": survey.documents,
            "bytes": survey.bytes,
            "characters": survey.total,
            "sha256": survey.sha256,
        },
    }
