"""Start a new run in four stages: check the request, open the text, build the parts, open the folder."""

import contextlib
import dataclasses
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llm import storage
from llm.config import TrainConfig, from_settings, write_toml
from llm.data import TokenData
from llm.errors import UserError
from llm.machine.device import DTYPES, choose_device, choose_dtype, fixed_order
from llm.machine.parallel import check_parallel
from llm.machine.world import ALONE, World
from llm.prepare.reuse import default_folder
from llm.start import fine_tuning
from llm.start.agreement import agree, local_rank
from llm.start.build import build, connect
from llm.start.init_from import Start, changed_settings, check_tokens
from llm.start.predict import write_predictions
from llm.start.run_data import beside
from llm.start.run_folder import Say, clear, disk_needed, refuse_existing, say_limits, write_environment
from llm.start.sources import open_sources
from llm.start.teacher import refuse_own_folder
from llm.start.texts import check_prompt, default_prompt, open_text
from llm.tokens.saved_tokenizer import save_tokenizer
from llm.tokens.tokenizer import Tokenizer
from llm.training import predictions
from llm.training.live import LiveRun
from llm.training.parts import Parts
from llm.training.state import Progress
from llm.weights.opened import Opened


@contextmanager
def new_run(
    config: TrainConfig,
    overwrite: bool = False,
    say: Say = lambda _: None,
    progress: Any = None,
    world: World = ALONE,
    given: Collection[str] | None = None,
) -> Iterator[LiveRun]:
    """Yield a new run, ready for `train`. Its folder is locked until the block ends.

    `progress(done, total)` shows the progress of tokenizing, then of the teachers' predictions. `given` are the names
    of the settings that the user gave (default: those that differ from the chapter's); with `init_from`, the weights
    decide some of the others. Of several processes only rank 0 touches the run folder.

    Raises UserError if the run cannot work. It leaves the run folder untouched then, but may have tokenized the text.
    """
    with contextlib.ExitStack() as stack:
        with world.together():
            device, dtype = check_request(config, overwrite, world)
            config, text, start, teachers = open_new_text(config, dtype, say, progress, world, given)
            agree(config, text.data, device, world)
        stack.enter_context(fixed_order(device))
        weights = start.weights if start else None
        parts = build(config, text.data, text.tokenizer, device, dtype, world, weights)
        is_pretrained = start is not None and start.is_pretrained
        del start, weights  # the model has copied its weights
        if not world.leads:
            teachers.clear()  # their weights are not needed: rank 0 alone lets them predict
        began = time.perf_counter()
        with world.together():
            if world.leads:
                stack.enter_context(open_new_folder(parts, overwrite, is_pretrained, teachers, say, progress))
            world.mark_started()
        predicting = time.perf_counter() - began if config.teacher else 0.0
        connect(parts, say)
        progress_so_far = Progress(seconds=predicting, predicting=predicting)
        yield LiveRun(parts, Path(config.out_dir), progress_so_far, text.prompt, text.fine_tuning_line)


def check_request(config: TrainConfig, overwrite: bool, world: World) -> tuple[torch.device, torch.dtype]:
    """Return the device and the precision of the run. Rank 0 chooses the precision for all.

    Raises UserError if the device does not exist, the settings do not fit the number of processes, or the run folder
    is not writable or holds a run.
    """
    device = choose_device(config.device, local_rank(world))
    dtype = DTYPES[world.first(lambda: name_of(choose_dtype(config.dtype, device)))]
    check_parallel(config, world, dtype)
    if world.leads:
        out_dir = Path(config.out_dir)
        refuse_existing(out_dir, overwrite)
        if out_dir.resolve() == Path(config.data_dir or default_folder(config)).resolve():
            raise UserError(f"out_dir = {out_dir}: is the folder of the token files; choose another for the run")
        refuse_own_folder(config)
        storage.check_writable(out_dir)
    return device, dtype


@dataclasses.dataclass(frozen=True)
class OpenText:
    """The data of a run: its token files, their tokenizer (None: unknown) and the prompt of its samples."""

    data: TokenData
    tokenizer: Tokenizer | None
    prompt: str
    fine_tuning_line: str  # about the settings for it; "": the weights are not of another program


def open_new_text(
    config: TrainConfig,
    dtype: torch.dtype,
    say: Say,
    progress: Any,
    world: World,
    given: Collection[str] | None,
) -> tuple[TrainConfig, OpenText, Start | None, list[Opened]]:
    """Return the config with all automatic choices made, the text, what to start from, and the teachers.

    The third is None for new weights. Tokenizes the text first if necessary. Raises UserError if it is too short, or if
    its tokens are not those of the weights of `init_from` or of the teachers.
    """
    given = changed_settings(config) if given is None else given
    sources = open_sources(config, say, given)
    config, start, teachers = sources.config, sources.start, sources.teachers
    line = ""
    world.gather(None)  # the other ranks wait here until rank 0 has passed its checks
    data, tokenizer = open_text(config, say, progress, sources.tokenizer, world)
    if start is None:
        vocab_size = config.vocab_size or data.vocab_size
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
    else:
        check_tokens(config, data, start.tokenizer, tokenizer, str(config.init_from))
        if start.is_pretrained:
            config = fine_tuning.with_steps(config, len(data.train), given)
            line = fine_tuning.line(config, len(data.train), given)
    if teachers:
        check_tokens(config, data, teachers[0].tokenizer, tokenizer, config.teacher[0])
    prompt = config.sample_prompt or default_prompt(data, tokenizer)
    check_prompt(tokenizer, prompt)
    return resolve(config, data, dtype, prompt), OpenText(data, tokenizer, prompt, line), start, teachers


def open_new_folder(
    parts: Parts, overwrite: bool, is_pretrained: bool, teachers: list[Opened], say: Say, progress: Any
) -> contextlib.ExitStack:
    """Lock the run folder, remove an earlier run if `overwrite` allows it, and write config, environment and tokenizer.

    Before that the `teachers` predict, which may take minutes: until it is done, an earlier run stays. The list is
    empty then. Returns the lock, to be closed when the run ends. Raises UserError if the disk is too small or the
    folder is in use.
    """
    config, out_dir = parts.config, Path(parts.config.out_dir)
    storage.check_writable(out_dir, disk_needed(config, len(parts.data.train)))
    with contextlib.ExitStack() as stack:
        stack.enter_context(storage.locked(out_dir, "this run folder"))
        is_there = refuse_existing(out_dir, overwrite)  # another process may have written since the first check
        with contextlib.ExitStack() as predicting:
            if teachers:
                folder = predicting.enter_context(storage.folder_in_place(out_dir / predictions.FOLDER))
                models = [teachers.pop(0).model(parts.device) for _ in range(len(teachers))]  # each copies its weights
                path = folder / predictions.NAME
                write_predictions(path, config, models, parts.data.train, parts.dtype, progress)
                parts.predictions = predictions.reader(out_dir, config)
            if is_there:
                clear(out_dir)  # its predictions too: those of the new run get their name at the block's end
        storage.write_text(out_dir / "config.toml", write_toml(config))
        write_environment(out_dir, parts.data, {"pretrained": True} if is_pretrained else {})
        if parts.tokenizer is not None:
            save_tokenizer(parts.tokenizer, out_dir / "tokenizer.json")
        say_limits(say)
        return stack.pop_all()


def resolve(config: TrainConfig, data: TokenData, dtype: torch.dtype, prompt: str) -> TrainConfig:
    """Return the config with the automatic choices as explicit values, so that a resume does not choose again."""
    chosen = {
        "data_dir": beside(data.folder, Path(config.out_dir)),
        "vocab_size": config.model.vocab_size,
        "warmup_steps": config.warmup,
        "min_lr": config.final_lr,
        "dtype": name_of(dtype),
        "sample_prompt": prompt,
    }
    if config.schedule == "wsd":
        chosen["decay_fraction"] = config.cooldown
    return from_settings(chosen, config)


def name_of(dtype: torch.dtype) -> str:
    """Return the value of the setting `dtype` that stands for a torch dtype."""
    return next(name for name, known in DTYPES.items() if known == dtype)
