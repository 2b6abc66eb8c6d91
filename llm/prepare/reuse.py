"""The folder of token files that a config trains on.

It is reused if it was prepared from the text of the config. It is prepared if it is not there, and waited for if
another process prepares it.
"""

import contextlib
import os
import re
import shlex
import time
from pathlib import Path
from typing import Any

from llm import storage
from llm.config import TrainConfig
from llm.errors import UserError
from llm.prepare.prepare import files_there, prepare
from llm.prepare.prepare_settings import check_settings
from llm.prepare.shards import Progress
from llm.text import corpus
from llm.text.corpus import Say, look
from llm.tokens.meta_json import hash_ends, hash_stamps
from llm.tokens.remedies import FEW, again, prepare_command
from llm.tokens.token_files import has_tokens, settle
from llm.tokens.tokenizer import Tokenizer

WAIT = 600.0  # seconds without progress after which another process that prepares the text is no longer waited for


OTHER_FOLDER = "choose another --data_dir"


COMPARED = ("tokenizer", "vocab_size", "val_fraction", "text_limit", "text_field")


def ensure(
    config: TrainConfig,
    offline: bool = False,
    progress: Progress | None = None,
    say: Say | None = None,
    given: Tokenizer | None = None,
) -> Path:
    """Return the folder of token files that `config` trains on, and prepare it if it is not there.

    Without `text`, the folder is `data_dir`, which has to be there, or `data`, prepared from the default text. With
    `text`, it is `data_dir` or `data/NAME`, reused if it was made from that text with those settings.

    Raises:
        UserError: the folder holds something else. Nothing is overwritten.
    """
    say = say or (lambda line: None)
    folder = Path(config.data_dir or default_folder(config))
    waited_for: set[Path] = set()
    while not files_there(folder) or storage.unfinished(folder):
        try:
            if _prepare_if_absent(folder, config, offline, progress, say, given):
                return folder
        except storage.InUse as error:
            if "-" in config.text:  # standard input is read already, and cannot be compared with the other's text
                raise
            if error.folder not in waited_for:
                say(f"{error.folder}: waiting for another process that uses it for this text")
            waited_for.add(error.folder)
            _wait_until_free(error.folder)
        except UserError:
            if not files_there(folder):  # else another process has just prepared it, between our look and our lock
                raise
    if not has_tokens(folder):
        raise UserError(f"{folder}: has no train.bin; {OTHER_FOLDER}, or {again(folder)}")
    if config.text:
        _refuse_other_text(folder, config, offline, say, given)
    elif config.tokenizer != "auto":
        _refuse_other_kind(folder, config)
    return folder


def _prepare_if_absent(
    folder: Path,
    config: TrainConfig,
    offline: bool,
    progress: Progress | None,
    say: Say,
    given: Tokenizer | None,
) -> bool:
    """Settle an interrupted preparation, then prepare the text if there are no token files; return whether it did.

    Raises InUse if another process prepares it.
    """
    if storage.unfinished(folder):
        with storage.locked(folder, "this token folder"):
            settle(folder)
    if files_there(folder):
        return False
    if config.data_dir and not config.text:
        command = prepare_command({"text": (), "tokenizer": config.tokenizer}, folder)
        raise UserError(
            f"data_dir = {config.data_dir}: no train.bin there; name a text with --text, or prepare tiny Shakespeare "
            f"with: {command}"
        )
    prepare(
        config.text,
        folder,
        config.tokenizer,
        config.vocab_size,
        config.val_fraction,
        offline=offline,
        progress=progress,
        say=say,
        block_size=config.model.block_size,
        given=given,
        text_limit=config.text_limit,
        text_field=config.text_field,
    )
    return True


def _wait_until_free(folder: Path) -> None:
    """Wait until no process holds `folder`. Raises InUse once nothing there has changed for WAIT seconds."""
    last_files = None
    last_change = time.monotonic()
    while storage.in_use(folder):
        with contextlib.suppress(OSError):  # a file is renamed while its size is read
            files = sorted((str(path), path.stat().st_size) for path in folder.rglob("*"))
            if files != last_files:
                last_files = files
                last_change = time.monotonic()
        if time.monotonic() - last_change > WAIT:
            raise storage.InUse(
                folder,
                f"{folder}: is in use by another process, which has made no progress for "
                f"{WAIT / 60:.0f} minutes; end that process, or choose another folder",
            )
        time.sleep(0.2)


def default_folder(config: TrainConfig) -> str:
    """Return `data`, or `data/NAME` for a text, with the tokenizer if one was chosen."""
    if not config.text:
        return "data"
    folder = f"data/{corpus.name_of(config.text)}"
    if config.tokenizer == "auto":
        return folder
    size = config.vocab_size if config.tokenizer == "bpe" and config.vocab_size else ""
    return f"{folder}-{config.tokenizer}{size}"


def _refuse_other_text(folder: Path, config: TrainConfig, offline: bool, say: Say, given: Tokenizer | None) -> None:
    """Raise UserError unless `folder` was made from the text of `config` with its settings."""
    wanted = check_settings(
        config.text, config.tokenizer, config.vocab_size, config.val_fraction, config.text_limit, config.text_field
    )
    remedy = OTHER_FOLDER
    if given is None and "-" not in config.text and len(config.text) <= FEW:
        # otherwise the command would use another tokenizer, lack the text, or be too long to read
        remedy += f", or prepare it again with: {prepare_command(wanted, folder)} --overwrite"
    if not (folder / "meta.json").exists():
        raise UserError(f"{folder} holds token files of another program; {OTHER_FOLDER}")
    meta = storage.read_json(folder / "meta.json")
    try:
        made = dict(meta["settings"])
        _refuse_other_settings(folder, made, wanted, meta["vocab_size"], remedy)
        if made_from(folder, config, offline, say):
            return
        first = str(meta["source"]["files"][0]["path"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{folder / 'meta.json'}: losscurve did not write it ({error!r}); {remedy}") from None
    if _absolute(made["text"]) == _absolute(config.text):
        raise UserError(f"{folder} was made from {' '.join(made['text'][:3])} before it changed; {remedy}")
    now = config.text[0]
    if not config.data_dir:  # two texts with the same name
        parent = Path(os.path.abspath(now)).parent.name or "root"
        own_folder = unused(str(folder.with_name(f"{parent}-{folder.name}")))
        remedy = f"give this one a folder of its own, with --data_dir {shlex.quote(own_folder)}"
    raise UserError(f"{folder} was made from another text, {first}, and this is {now}; {remedy}")


def _refuse_other_settings(
    folder: Path, made: dict[str, Any], wanted: dict[str, Any], vocab_size: int, remedy: str
) -> None:
    """Raise UserError for a setting that differs from those that `folder` was made with."""
    if wanted["tokenizer"] not in ("auto", "bpe"):
        wanted["vocab_size"] = made["vocab_size"]  # the size given is for the model, not for the tokenizer
    if made["vocab_size"] is None and wanted["vocab_size"] == vocab_size:
        wanted["vocab_size"] = None  # the size given is the one that the tokenizer has
    for name in COMPARED:
        is_optional = name in ("text_limit", "text_field")
        before = made.get(name) if is_optional else made[name]
        now = wanted.get(name)
        if before != now:
            raise UserError(f"{folder} was made with {name} = {before}, not {now}; {remedy}")


def _absolute(text: Any) -> list[str]:
    return [os.path.abspath(word) for word in text]


def made_from(folder: Path, config: TrainConfig, offline: bool = False, say: Say = lambda line: None) -> bool:
    """Return whether the token files of `folder` were made from the text of `config`.

    What counts is the content of the text and where its files end, not where the files are or how they are named.

    Raises:
        UserError: the meta.json of `folder` does not describe its text.
    """
    meta = storage.read_json(folder / "meta.json")
    try:
        words = list(meta["settings"]["text"])
        source = meta["source"]
        has_same_names = words == list(config.text)
        if has_same_names and all(word in corpus.NAMED_TEXTS for word in words):
            return True  # a name always means the same text
        with corpus.opened(config.text, offline, config.text_limit, say, config.text_field) as now:
            if has_same_names and source.get("stamps", hash_stamps(source["files"])) == hash_stamps(now.stamps()):
                return True
            survey = look(now)
            if "ends" in source:
                return bool((source["sha256"], source["ends"]) == (survey.sha256, hash_ends(survey)))
            # an older version wrote the size of each file instead of "ends"
            sizes = [file["size"] for file in source["files"]]
            are_both_single = len(sizes) == 1 and len(now.files) == 1
            same_ends = are_both_single or sizes == [file.size for file in now.files]
            return bool(source["sha256"] == survey.sha256 and same_ends)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'meta.json'}: losscurve did not write it ({error!r}); {OTHER_FOLDER}") from None


def unused(name: str) -> str:
    """Return `name`, or the first of name-2, name-3, … that is no file or folder yet."""
    stem = re.sub(r"-[0-9]+$", "", name)
    free = name
    number = 2
    while Path(free).exists():
        free = f"{stem}-{number}"
        number += 1
    return free


def _refuse_other_kind(folder: Path, config: TrainConfig) -> None:
    """Raise UserError unless `folder` holds tokens of the kind that `config` names."""
    kind = _read_kind(folder)
    if kind != config.tokenizer:
        raise UserError(f"{folder} holds {kind} tokens, not {config.tokenizer}; {OTHER_FOLDER}, or name a --text")


def _read_kind(folder: Path) -> str:
    """Return the kind of tokens in a folder; without meta.json, characters or GPT-2's (see `vocabulary_of`)."""
    if not (folder / "meta.json").exists():
        return "char" if (folder / "meta.pkl").exists() else "gpt2"
    meta = storage.read_json(folder / "meta.json")
    try:
        return str(meta["tokenizer"]["kind"])
    except (KeyError, TypeError):
        raise UserError(f"{folder / 'meta.json'}: names no tokenizer; {again(folder)}") from None
