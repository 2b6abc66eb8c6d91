"""Text to a folder of token files, with tokenizer.json, and meta.json, which describes them.

The text is read twice and never held: once to count and check it, once to tokenize it, piece by piece on all cores.
The files replace those of an earlier preparation together, or not at all; that of a text of several shards goes on
where it was interrupted.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llm import storage
from llm.config import from_settings
from llm.errors import Failure, UserError
from llm.text import corpus, hub
from llm.text.corpus import Corpus, Survey, look, span
from llm.text.rows import FIELD
from llm.tokens import journal
from llm.tokens.bpe import BPE_VOCAB_SIZE, gpt2, train_bpe
from llm.tokens.journal import Journal, Key
from llm.tokens.saved_tokenizer import save_tokenizer
from llm.tokens.shards import SHARD_TOKENS, Progress, write_splits
from llm.tokens.token_files import settle, token_files
from llm.tokens.tokenizer import Bytes, Characters, Tokenizer

FORMAT, VERSION = "losscurve tokens", 1


FILES = ("train.bin", "val.bin", "meta.json", "tokenizer.json")


MET = 10  # times that an id in use has to stand in the training tokens, on average, for no hint at another tokenizer


# what is written into meta.json, state.json or tokenizer.json is bounded here, far below what storage reads of a file
LISTED = 1000  # files that meta.json names; of all it has a sum


NAMES = 8 * 2**20  # bytes of the names of texts


MOST_SHARDS = 100_000


MOST_TOKENS = 1_000_000  # in the vocabulary of a bpe


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
        most = survey.bytes + survey.documents  # tokens: no tokenizer makes more
        if most > MOST_SHARDS * shard_tokens:
            raise UserError(
                f"shard_tokens = {shard_tokens}: perhaps {most // shard_tokens} shards; give at least "
                f"{-(-most // MOST_SHARDS)}"
            )
        if not 0 < cut < survey.total:
            raise UserError(f"{names}: {survey.total} characters cannot be split for validation; give more text")
        if tokenizer == "char" and given is None:
            ready = Characters(survey.alphabet)
        key = _key(settings, survey, given, shard_tokens)
        long = most > shard_tokens
        if ready and vocab_size is not None and vocab_size < ready.vocab_size:
            raise UserError(f"vocab_size = {vocab_size} is below the {ready.vocab_size} of {ready.kind}; leave it out")
        needed = survey.bytes * (2 if ready and ready.kind in ("byte", "char") else 1)
        storage.check_writable(data_dir, needed=max(0, needed - journal.held(data_dir)))
        try:
            with storage.locked(data_dir, "this token folder"):
                storage.recover(data_dir)
                _refuse_occupied(data_dir, overwrite)  # again: another process may have been here
                ready = (journal.tokenizer_of(data_dir, key) if long else None) or ready
                if ready is None:
                    if cut > SAMPLE:
                        say(f"training the bpe on {SAMPLE / 1e6:.0f} of {cut / 1e6:.0f} M characters, evenly spread")
                    ready = train_bpe(_sample(source, survey, cut), vocab_size or BPE_VOCAB_SIZE)
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
                if small := hint(meta):
                    say(small)
                settle(data_dir)  # shards of the earlier preparation that this one has no name for
        except OSError as error:
            raise Failure(f"{data_dir}: cannot write ({error.strerror}); make room, then run this again") from None
    for limit in storage.limits():
        say(limit)
    return meta


def hint(meta: dict[str, Any]) -> str | None:
    """What to say of a text for which "auto" took GPT-2's tokens, if it is too small for them: an id that is met fewer
    than MET times on average is hardly learned. Tiny Shakespeare has 25, a text of 20 KB about 4.
    """
    tokens, used = meta["splits"]["train"]["tokens"], meta["vocab_used"]
    if meta["settings"]["tokenizer"] != "auto" or meta["tokenizer"]["kind"] != "gpt2" or tokens >= MET * used:
        return None
    return (
        f"{meta['source']['name']}: its text uses {used:,} of {meta['vocab_size']:,} ids, each fewer than {MET} times "
        f"on average; a small vocabulary fits it better: --tokenizer bpe --vocab_size 512, or --tokenizer char"
    )


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
    if tokenizer == "bpe" and vocab_size is not None and vocab_size > MOST_TOKENS:
        raise UserError(f"vocab_size = {vocab_size}: a bpe has at most {MOST_TOKENS}")
    if (size := len(json.dumps(text))) > NAMES:
        raise UserError(
            f"text: the names of its {len(text)} files take {size // 2**20} MiB; put them into a folder, and name that"
        )
    if text_limit is None:
        return {"text": list(text)} | wanted
    if not any(word in hub.TEXTS for word in text):
        raise UserError(f"text_limit = {text_limit}: is for {' and '.join(hub.TEXTS)}; other texts are taken whole")
    return {"text": list(text)} | wanted | {"text_limit": text_limit}


def _key(settings: dict[str, Any], survey: Survey, given: Tokenizer | None, shard_tokens: int) -> Key:
    """What has to be the same where an interrupted preparation is taken up."""
    settings = {name: value for name, value in settings.items() if name != "text"}  # its content counts, not its name
    tokens = hashlib.sha256(repr(given and given.to_json()).encode()).hexdigest()
    text = {"sha256": survey.sha256, "ends": _ends(survey)}
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


def _ends(survey: Survey) -> str:
    """The hash of where files end in a text: there an end-of-text stands."""
    return hashlib.sha256(repr(survey.characters).encode()).hexdigest()


def _sum(stamps: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(stamps, sort_keys=True).encode()).hexdigest()


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
    tokenizer, stamps = journal.tokenizer, source.stamps()
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
            "files": stamps[:LISTED],
            "more": len(stamps[LISTED:]),
            "stamps": _sum(stamps),
            "documents": survey.documents,
            "bytes": survey.bytes,
            "characters": survey.total,
            "sha256": survey.sha256,
            "ends": _ends(survey),
        },
    }
