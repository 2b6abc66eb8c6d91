"""Prepare a text: write a folder of token files, tokenizer.json, and meta.json, which describes them.

The text is read twice and never held in memory: once to count and check it, once to tokenize it, piece by piece on all
cores. The new files replace those of an earlier preparation together, or not at all. The preparation of a text of
several shards resumes where it was interrupted.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm import storage
from llm.errors import Failure, UserError
from llm.prepare import journal
from llm.prepare.choose_tokenizer import open_tokenizer, suggest_tokenizer, train_tokenizer
from llm.prepare.journal import Journal, Key
from llm.prepare.prepare_settings import check_settings
from llm.prepare.shards import SHARD_TOKENS, Progress, write_splits
from llm.text import corpus
from llm.text.corpus import Corpus, Say, Survey, look
from llm.tokens.meta_json import VERSION, build_meta, hash_ends
from llm.tokens.saved_tokenizer import save_tokenizer
from llm.tokens.token_files import settle, token_files
from llm.tokens.tokenizer import Characters, Tokenizer

FILES = ("train.bin", "val.bin", "meta.json", "tokenizer.json")


MOST_SHARDS = 100_000  # meta.json lists them


@dataclass(frozen=True)
class Job:
    """A text to prepare, after the first pass over it."""

    source: Corpus
    survey: Survey
    settings: dict[str, Any]  # as meta.json records them
    train_characters: int  # the rest is the validation split
    block_size: int
    shard_tokens: int
    key: Key  # a preparation resumes only one with the same key

    @property
    def names(self) -> str:
        """The names of the first files, for messages."""
        return ", ".join([file.label for file in self.source.files][:3])

    @property
    def most_tokens(self) -> int:
        """An upper bound of the number of tokens, whatever the tokenizer."""
        return self.survey.bytes + self.survey.documents

    @property
    def has_journal(self) -> bool:
        """Whether the text may fill several shards, so that a journal of finished shards is kept."""
        return self.most_tokens > self.shard_tokens

    def check(self) -> None:
        """Raise UserError for a text that is too small to split, or too large for the shards."""
        if not self.survey.total:
            raise UserError(f"{self.names}: the text is empty; give some text")
        if self.most_tokens > MOST_SHARDS * self.shard_tokens:
            least = -(-self.most_tokens // MOST_SHARDS)
            raise UserError(
                f"shard_tokens = {self.shard_tokens}: perhaps {self.most_tokens // self.shard_tokens} shards; "
                f"give at least {least}"
            )
        if not 0 < self.train_characters < self.survey.total:
            raise UserError(
                f"{self.names}: {self.survey.total} characters cannot be split for validation; give more text"
            )


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
    """Write the token files of `text` into `data_dir`, and return the content of meta.json.

    `text` is as in `corpus.opened`, the settings are as in `TrainConfig`. A tokenizer that is `given` (that of
    weights to start from) is used as it is. A split of more than `shard_tokens` tokens is written in shards of
    that many. The training split has to hold a window of `block_size` tokens and one token more, unless
    `block_size` is 0.

    Raises:
        UserError: among others, `data_dir` holds token files and `overwrite` is false. Nothing there has changed.
        Failure: a download or a write fails.
    """
    settings = check_settings(text, tokenizer, vocab_size, val_fraction, text_limit, text_field)
    if shard_tokens < 1:
        raise UserError(f"shard_tokens = {shard_tokens}: expected at least 1")
    say = say or (lambda line: None)
    _refuse_occupied(data_dir, overwrite)
    with corpus.opened(text, offline, text_limit, say, text_field) as source:
        ready = given or open_tokenizer(tokenizer, source, offline, say)
        job = _survey(source, settings, given, block_size, shard_tokens, say)
        if tokenizer == "char" and given is None:
            ready = Characters(job.survey.alphabet)
        if ready:
            _check_vocabulary(ready, vocab_size)
        _check_space(data_dir, job.survey, ready)
        try:
            with storage.locked(data_dir, "this token folder"):
                storage.recover(data_dir)
                _refuse_occupied(data_dir, overwrite)  # again: another process may have written here
                meta = _write_folder(data_dir, job, ready, vocab_size, progress, say)
        except OSError as error:
            raise Failure(
                f"{data_dir}: cannot write ({error.strerror}); free disk space, then run this again"
            ) from None
    for limit in storage.limits():
        say(limit)
    return meta


def files_there(folder: Path) -> list[str]:
    """Return the names of the files of a preparation that are in `folder`."""
    return sorted({name for name in FILES if (folder / name).exists()} | set(token_files(folder)))


def _survey(
    source: Corpus, settings: dict[str, Any], given: Tokenizer | None, block_size: int, shard_tokens: int, say: Say
) -> Job:
    """Read the text for the first time, and check that it can be prepared."""
    survey = look(source, alphabet=settings["tokenizer"] == "char")
    for notice in survey.notices:
        say(notice)
    train_characters = int(survey.total * (1 - settings["val_fraction"]))
    key = _make_key(settings, survey, given, shard_tokens)
    job = Job(source, survey, settings, train_characters, block_size, shard_tokens, key)
    job.check()
    return job


def _write_folder(
    data_dir: Path, job: Job, ready: Tokenizer | None, vocab_size: int | None, progress: Progress | None, say: Say
) -> dict[str, Any]:
    """Write the files of a preparation in one transaction, and return the content of meta.json."""
    saved = journal.read_tokenizer(data_dir, job.key) if job.has_journal else None
    tokenizer = saved or ready
    if tokenizer is None:
        tokenizer = train_tokenizer(job.source, job.survey, job.train_characters, vocab_size, say)
    done = _open_journal(data_dir, job, tokenizer, say)
    with storage.transaction(data_dir, keep=job.has_journal) as staging:
        meta = _write_files(staging, job, done, progress)
        _check_windows(meta, job)
        storage.write_json(staging / "meta.json", meta)
    journal.discard(data_dir)
    if suggestion := suggest_tokenizer(meta):
        say(suggestion)
    settle(data_dir)  # removes shards of the earlier preparation whose names this one does not use
    return meta


def _open_journal(data_dir: Path, job: Job, tokenizer: Tokenizer, say: Say) -> Journal:
    """Return the journal of an interrupted preparation of the same text and settings, or an empty one."""
    if not job.has_journal:
        _discard_unfinished(data_dir, say)
        return Journal(None, job.key, tokenizer, [])
    shards = journal.read_finished_shards(data_dir, job.key, tokenizer)
    if shards is None:
        _discard_unfinished(data_dir, say)
        return Journal(data_dir, job.key, tokenizer, [])
    if shards:
        tokens = sum(shard["tokens"] for shard in shards)
        say(f"{data_dir}: resuming an interrupted preparation; {len(shards)} shards ({tokens:,} tokens) are finished")
    return Journal(data_dir, job.key, tokenizer, shards)


def _discard_unfinished(data_dir: Path, say: Say) -> None:
    if journal.discard(data_dir):
        say(f"{data_dir}: discarding an unfinished preparation of another text or with other settings")


def _write_files(staging: Path, job: Job, done: Journal, progress: Progress | None) -> dict[str, Any]:
    """Write tokenizer.json and the token files into `staging`, remove other files, and return the meta.json."""
    save_tokenizer(done.tokenizer, staging / "tokenizer.json")
    done.write()
    splits, used = write_splits(staging, job.source, job.survey, job.train_characters, done, job.shard_tokens, progress)
    written = {"tokenizer.json"}
    for split in splits.values():
        written |= {file["file"] for file in split.get("shards", [split])}
    for path in staging.iterdir():
        if path.name not in written:
            path.unlink()
    return build_meta(staging, done.tokenizer, job.source, job.survey, splits, used, job.settings)


def _check_windows(meta: dict[str, Any], job: Job) -> None:
    """Raise UserError for a split that is shorter than a window."""
    needed_tokens = {"train": job.block_size + 1, "val": min(job.block_size, 1) + 1}
    for split, needed in needed_tokens.items():
        tokens = meta["splits"][split]["tokens"]
        if tokens < needed:
            other = "a smaller --block_size" if split == "train" else "a larger --val_fraction"
            raise UserError(
                f"{job.names}: the {split} split has {tokens} tokens, and a window needs {needed}; "
                f"give more text or {other}"
            )


def _make_key(settings: dict[str, Any], survey: Survey, given: Tokenizer | None, shard_tokens: int) -> Key:
    """Return what must be the same for a preparation to resume an interrupted one."""
    return {
        "version": VERSION,
        # without the names of the text: its content counts
        "settings": {name: value for name, value in settings.items() if name != "text"},
        "text": {"sha256": survey.sha256, "ends": hash_ends(survey)},
        "given": hashlib.sha256(repr(given and given.to_json()).encode()).hexdigest(),
        "shard_tokens": shard_tokens,
    }


def _refuse_occupied(folder: Path, overwrite: bool) -> None:
    names = files_there(folder)
    if not names or overwrite:
        return
    if len(names) > 5:
        names = [*names[:4], f"{len(names) - 4} more"]
    raise UserError(f"{folder} already holds {', '.join(names)}; add --overwrite, or choose another --data_dir")


def _check_vocabulary(tokenizer: Tokenizer, vocab_size: int | None) -> None:
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"vocab_size = {vocab_size} is below the {tokenizer.vocab_size} of {tokenizer.kind}; leave it out"
        )


def _check_space(data_dir: Path, survey: Survey, tokenizer: Tokenizer | None) -> None:
    """Raise UserError if the token files do not fit on the disk, or the folder cannot be written."""
    bytes_per_byte = 2 if tokenizer and tokenizer.kind in ("byte", "char") else 1
    needed = survey.bytes * bytes_per_byte
    storage.check_writable(data_dir, needed=max(0, needed - journal.count_bytes(data_dir)))
