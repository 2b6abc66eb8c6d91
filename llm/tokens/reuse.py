"""The folder of token files that a config trains on: used again where it is of that text, prepared where it is not
there, waited for where another process prepares it.
"""

import contextlib
import itertools
import os
import re
import shlex
import time
from pathlib import Path

from llm import storage
from llm.config import TrainConfig
from llm.errors import UserError
from llm.text import corpus, hub
from llm.text.corpus import look
from llm.tokens.prepare import Say, _ends, _settings, _sum, files_there, prepare
from llm.tokens.remedies import FEW, again, prepare_command
from llm.tokens.shards import Progress
from llm.tokens.token_files import has_tokens, settle
from llm.tokens.tokenizer import Tokenizer

WAIT = 600.0  # seconds without progress after which another process that prepares the text is not waited for any more


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
    waited: list[Path] = []
    while not files_there(folder) or storage.unfinished(folder):
        try:
            if _make(folder, config, offline, progress, say, given):
                return folder
        except storage.InUse as error:
            if "-" in config.text:  # which was read, and cannot be compared with what the other one makes
                raise
            if say and error.folder not in waited:
                say(f"{error.folder}: waiting for another process that uses it for this text")
            waited.append(error.folder)
            _wait(error.folder)
    if not has_tokens(folder):
        raise UserError(f"{folder}: has no train.bin; choose another --data_dir, or {again(folder)}")
    elif config.text:
        _refuse_other(folder, config, offline, say or (lambda line: None), given)
    elif config.tokenizer != "auto":
        kind = _kind(folder)
        if kind != config.tokenizer:
            raise UserError(
                f"{folder} holds {kind} tokens, not {config.tokenizer}; choose another --data_dir, or name a --text"
            )
    return folder


def _make(
    folder: Path,
    config: TrainConfig,
    offline: bool,
    progress: Progress | None,
    say: Say | None,
    given: Tokenizer | None,
) -> bool:
    """Prepare the text of `config`, unless token files are there once an interrupted preparation is settled; whether
    it did. Raises InUse where another process prepares it."""
    if storage.unfinished(folder):
        with storage.locked(folder, "this token folder"):
            settle(folder)
    if files_there(folder):
        return False
    if config.data_dir and not config.text:
        command = prepare_command({"text": (), "tokenizer": config.tokenizer}, folder)
        raise UserError(
            f"data_dir = {config.data_dir}: no train.bin there; name a text with --text, or make it from tiny "
            f"Shakespeare with: {command}"
        )
    settings = (config.tokenizer, config.vocab_size, config.val_fraction)
    block_size = config.model.block_size
    limit, field = config.text_limit, config.text_field
    prepare(config.text, folder, *settings, offline, False, progress, say, block_size, given, limit, text_field=field)
    return True


def _wait(folder: Path) -> None:
    """Wait until no process holds `folder`. Raises InUse once nothing there has changed for WAIT seconds."""
    before, since = None, time.monotonic()
    while storage.in_use(folder):
        with contextlib.suppress(OSError):  # a file that is renamed while it is looked at
            now = sorted((str(path), path.stat().st_size) for path in folder.rglob("*"))
            before, since = now, since if now == before else time.monotonic()
        if time.monotonic() - since > WAIT:
            raise storage.InUse(
                folder,
                f"{folder}: is in use by another process, which has made no progress for "
                f"{WAIT / 60:.0f} minutes; end that process, or choose another folder",
            )
        time.sleep(0.2)


def default_folder(config: TrainConfig) -> str:
    """`data`, or `data/NAME` for a text, with the tokenizer where one was chosen."""
    if not config.text:
        return "data"
    size = config.vocab_size if config.tokenizer == "bpe" and config.vocab_size else ""
    return f"data/{corpus.name_of(config.text)}" + (f"-{config.tokenizer}{size}" if config.tokenizer != "auto" else "")


def _refuse_other(folder: Path, config: TrainConfig, offline: bool, say: Say, given: Tokenizer | None) -> None:
    """UserError unless `folder` was made from the text of `config` with its settings."""
    remedy = "choose another --data_dir"
    wanted = _settings(
        config.text, config.tokenizer, config.vocab_size, config.val_fraction, config.text_limit, config.text_field
    )
    if given is None and "-" not in config.text and len(config.text) <= FEW:
        # else a command would make it with another tokenizer, without its text, or be too long to read
        remedy += f", or prepare it again with: {prepare_command(wanted, folder)} --overwrite"
    if not (folder / "meta.json").exists():
        raise UserError(f"{folder} holds token files of another program; choose another --data_dir")
    meta = storage.read_json(folder / "meta.json")
    try:
        made = dict(meta["settings"])
        if wanted["tokenizer"] not in ("auto", "bpe"):  # there it is a size for the model, not for the text
            wanted["vocab_size"] = made["vocab_size"]
        if made["vocab_size"] is None and wanted["vocab_size"] == meta["vocab_size"]:  # what it came to, named
            wanted["vocab_size"] = None
        for name in ("tokenizer", "vocab_size", "val_fraction", "text_limit", "text_field"):
            optional = name in ("text_limit", "text_field")
            before, now = made.get(name) if optional else made[name], wanted.get(name)
            if before != now:
                raise UserError(f"{folder} was made with {name} = {before}, not {now}; {remedy}")
        if made_from(folder, config, offline, say):
            return
        first, now = str(meta["source"]["files"][0]["path"]), config.text[0]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{folder / 'meta.json'}: not one of ours ({error!r}); {remedy}") from None
    if [os.path.abspath(word) for word in made["text"]] == [os.path.abspath(word) for word in config.text]:
        raise UserError(f"{folder} was made from {' '.join(made['text'][:3])} before it changed; {remedy}")
    if not config.data_dir:  # two texts of one name
        parent = Path(os.path.abspath(now)).parent.name or "root"
        own = unused(str(folder.with_name(f"{parent}-{folder.name}")))
        remedy = f"give this one a folder of its own, with --data_dir {shlex.quote(own)}"
    raise UserError(f"{folder} was made from another text, {first}, and this is {now}; {remedy}")


def made_from(folder: Path, config: TrainConfig, offline: bool = False, say: Say = lambda line: None) -> bool:
    """Whether the token files of `folder` are of the text of `config`: by its content and where its files end, wherever
    they are and however they are spelled. Raises UserError where its meta.json does not say.
    """
    meta = storage.read_json(folder / "meta.json")
    try:
        words, source = list(meta["settings"]["text"]), meta["source"]
        if words == list(config.text) and all(word in (corpus.SHAKESPEARE, *hub.TEXTS) for word in words):
            return True  # a name is one text, wherever its file went
        with corpus.opened(config.text, offline, config.text_limit, say, config.text_field) as now:
            if words == list(config.text) and source.get("stamps", _sum(source["files"])) == _sum(now.stamps()):
                return True
            survey = look(now)
            if "ends" in source:
                return bool((source["sha256"], source["ends"]) == (survey.sha256, _ends(survey)))
            sizes = [file["size"] for file in source["files"]]  # of an older version, which wrote no "ends"
            same = len(sizes) == 1 == len(now.files) or sizes == [file.size for file in now.files]
            return bool(source["sha256"] == survey.sha256 and same)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'meta.json'}: not one of ours ({error!r}); choose another --data_dir") from None


def unused(name: str) -> str:
    """`name`, or the first with another number behind it, that is no file or folder yet."""
    numbered = (f"{re.sub(r'-[0-9]+$', '', name)}-{number}" for number in itertools.count(2))
    return next(free for free in itertools.chain([name], numbered) if not Path(free).exists())


def _kind(folder: Path) -> str:
    """The kind of tokens in a folder; without meta.json, characters or GPT-2's (`tokens.vocabulary_of`)."""
    if not (folder / "meta.json").exists():
        return "char" if (folder / "meta.pkl").exists() else "gpt2"
    meta = storage.read_json(folder / "meta.json")
    try:
        return str(meta["tokenizer"]["kind"])
    except (KeyError, TypeError):
        raise UserError(f"{folder / 'meta.json'}: says no tokenizer; {again(folder)}") from None
