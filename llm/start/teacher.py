"""The teachers of a run: weights whose predictions it learns from, besides its text (distillation, Hinton et al. 2015).

They predict once, before the first step (`llm.start.predict`); a resume does not need them.
"""

from collections.abc import Sequence
from pathlib import Path

from llm.config import TrainConfig, from_settings
from llm.errors import UserError
from llm.prepare.reuse import made_from
from llm.start.init_from import may_be_same, other_tokens, token_settings
from llm.start.run_data import hashes_of, open_run_data
from llm.start.run_folder import Say
from llm.tokens.saved_tokenizer import load_tokenizer
from llm.tokens.token_files import has_tokens, read_meta
from llm.weights import open_weights, run_config
from llm.weights.opened import Opened


def open_teachers(config: TrainConfig) -> list[Opened]:
    """Return the weights that `teacher` names. With `init_from`, `config` is that of the start, with its shape.

    Raises UserError if they cannot be used, see too short a context, or have other tokens than each other or another
    vocabulary than those of `init_from`.
    """
    teachers = [open_weights(name, config.model) for name in config.teacher]
    for name, teacher in zip(config.teacher, teachers, strict=True):
        longest = teacher.config.block_size
        if config.model.block_size > longest:
            raise UserError(
                f"block_size = {config.model.block_size}: the teacher {name} sees {longest} tokens; give "
                f"--block_size {longest} or less"
            )
        if config.init_from and teacher.config.vocab_size != config.model.vocab_size:
            raise UserError(
                f"teacher = {name}: has a vocabulary of {teacher.config.vocab_size}, and the weights of "
                f"{config.init_from} one of {config.model.vocab_size}; give others, or leave one of the two out"
            )
        first = teachers[0]
        if teacher.config.vocab_size != first.config.vocab_size or not may_be_same(teacher.tokenizer, first.tokenizer):
            raise UserError(f"teacher = {name}: has other tokens than {config.teacher[0]}; leave one of the two out")
    return teachers


def refuse_own_folder(config: TrainConfig) -> None:
    """Raise UserError if a teacher is the run folder, or in it: a new run clears that."""
    out_dir = Path(config.out_dir).resolve()
    for name in config.teacher:
        if Path(name).resolve().is_relative_to(out_dir) and Path(name).exists():
            raise UserError(f"teacher = {name}: is in the run folder {config.out_dir}; choose another --out_dir")


def with_tokens(config: TrainConfig, teachers: Sequence[Opened], say: Say) -> TrainConfig:
    """Return the config with the tokens of its teachers: those of the first one's run, unless others are given.

    Raises UserError if the config asks for another tokenizer or vocabulary, or if there is no text and the run's own
    files are gone.
    """
    name, teacher = config.teacher[0], teachers[0]
    size = teacher.config.vocab_size
    if config.vocab_size not in (None, size):
        raise UserError(f"vocab_size = {config.vocab_size}: the teacher {name} has {size} tokens; leave it out")
    chosen = token_settings(config, teacher, name, say) | {"vocab_size": size}
    folder = Path(config.data_dir) if config.data_dir else _tokens_of_run(teacher, config, say)
    if folder and has_tokens(folder):
        theirs = folder / "tokenizer.json"
        if teacher.tokenizer and theirs.exists() and not may_be_same(load_tokenizer(theirs), teacher.tokenizer):
            raise other_tokens(folder, name)
        made = (read_meta(folder) or {}).get("settings") or {}  # another program's files have none
        chosen |= {"data_dir": folder, "tokenizer": made.get("tokenizer", chosen["tokenizer"])}
    return from_settings(chosen, config)


def _tokens_of_run(teacher: Opened, config: TrainConfig, say: Say) -> Path | None:
    """Return the token files of the teacher's run; None if the text that is given is another, or they are gone.

    Raises UserError if they are gone or changed and no text is given.
    """
    if not teacher.is_ours or "-" in config.text:  # standard input can be read only once
        return None
    run_dir = teacher.path.parent
    expected = hashes_of(run_dir)
    try:
        folder = open_run_data(run_dir, run_config(run_dir), expected).folder
    except UserError:
        if config.text:
            return None
        raise
    if config.text and not ((folder / "meta.json").exists() and made_from(folder, config, say=say)):
        return None
    return folder
