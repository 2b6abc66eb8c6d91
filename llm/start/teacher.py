"""The teacher of a run: weights whose predictions it learns from, besides its text (distillation, Hinton et al. 2015).

The run folder holds a copy of them, in the form of a saved state, so that a resume needs no other folder.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llm import storage
from llm.arch import Model, make_model
from llm.config import GPTConfig, TrainConfig, from_settings
from llm.errors import UserError
from llm.machine.world import ALONE, World, receive
from llm.prepare.reuse import made_from
from llm.start.init_from import token_settings
from llm.start.run_data import places_of
from llm.start.run_folder import TEACHER, Say
from llm.storage import checkpoint
from llm.tokens.token_files import has_tokens, read_meta
from llm.weights import open_weights, run_config
from llm.weights.opened import Opened


def open_teacher(config: TrainConfig) -> Opened:
    """Return the weights that `teacher` names. Raises UserError if they cannot be used, or see too short a context."""
    teacher = open_weights(str(config.teacher), config.model)
    longest = teacher.config.block_size
    if config.model.block_size > longest:
        raise UserError(
            f"block_size = {config.model.block_size}: the teacher {config.teacher} sees {longest} tokens; give "
            f"--block_size {longest} or less"
        )
    return teacher


def with_tokens(config: TrainConfig, teacher: Opened, say: Say) -> TrainConfig:
    """Return the config with the tokens of the teacher: its run's own files if they are of the text that is asked for.

    Raises UserError if the config asks for another tokenizer.
    """
    chosen = token_settings(config, teacher, "teacher", say)
    if config.vocab_size not in (None, teacher.config.vocab_size):
        raise UserError(
            f"vocab_size = {config.vocab_size}: the teacher {config.teacher} has {teacher.config.vocab_size} tokens; "
            "leave it out"
        )
    folder = Path(config.data_dir) if config.data_dir else _tokens_of_run(teacher, config, say)
    if folder and has_tokens(folder):
        made = (read_meta(folder) or {}).get("settings") or {}  # another program's files have none
        chosen |= {"data_dir": folder, "vocab_size": made.get("vocab_size")}
    return from_settings(chosen, config)


def _tokens_of_run(teacher: Opened, config: TrainConfig, say: Say) -> Path | None:
    """Return the token files of the teacher's run, None if they are gone or were made from another text."""
    if not teacher.is_ours:
        return None
    run_dir = teacher.path.parent
    theirs = run_config(run_dir)
    for place in places_of(theirs.data_dir or "data", run_dir, theirs):
        if not has_tokens(place):
            continue
        if not config.text or ((place / "meta.json").exists() and made_from(place, config, say=say)):
            return place
    return None


def check_teacher(config: TrainConfig, teacher: Opened) -> None:
    """Raise UserError if the vocabulary of the teacher is not that of the model."""
    if teacher.config.vocab_size != config.model.vocab_size:
        raise UserError(
            f"vocab_size = {config.model.vocab_size}: the teacher {config.teacher} has {teacher.config.vocab_size} "
            f"tokens; give --vocab_size {teacher.config.vocab_size}"
        )


def write_teacher(out_dir: Path, teacher: Model) -> None:
    """Write the teacher's weights and shape to the run folder. Raises OSError."""
    with storage.folder_in_place(out_dir / TEACHER) as folder:
        with storage.writing(folder / "model.safetensors") as file:
            for part in checkpoint.serialize_tensors(dict(teacher.named_parameters())):
                file.write(part)
        storage.write_json(folder / "state.json", {"step": 0, "model": asdict(teacher.config)})


def read_teacher(out_dir: Path, device: torch.device, world: World = ALONE) -> Model:
    """Return the teacher from the run folder, which only rank 0 reads. Raises UserError if it is gone or damaged."""
    groups: checkpoint.Groups = {}

    def read() -> Any:
        tensors, facts = checkpoint.load_state(out_dir / TEACHER)
        groups.update(tensors)
        return facts["model"]

    teacher = make_model(GPTConfig(**world.first(read))).to(device)
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            receive(world, p, groups.get("model", {}).get(name))
    return teacher
