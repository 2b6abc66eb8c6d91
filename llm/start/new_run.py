"""Start a new run: everything is checked before its folder is touched."""

import contextlib
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llm import storage
from llm.config import TrainConfig, from_settings, write_toml
from llm.data import TokenData
from llm.errors import UserError
from llm.machine.device import DTYPES, choose_device, choose_dtype
from llm.machine.parallel import check_parallel
from llm.machine.world import ALONE, World
from llm.start.agreement import agree, local_rank
from llm.start.build import build, connect
from llm.start.init_from import check_tokens, starting_point
from llm.start.run_data import beside
from llm.start.run_folder import Say, clear, disk_needed, refuse_existing, say_limits, write_environment
from llm.start.texts import default_prompt, open_text
from llm.tokens.reuse import default_folder
from llm.tokens.saved_tokenizer import save_tokenizer
from llm.training.live import LiveRun
from llm.training.state import Progress


@contextmanager
def new_run(
    config: TrainConfig,
    overwrite: bool = False,
    say: Say = lambda _: None,
    progress: Any = None,
    world: World = ALONE,
) -> Iterator[LiveRun]:
    """A new run, ready to iterate over. The folder is locked until the block ends.

    Everything is checked before the run folder is touched; the text may have been tokenized by then. Of several
    processes the leading one alone touches that folder.
    Raises UserError where it cannot work.
    """
    out_dir = Path(config.out_dir)
    with contextlib.ExitStack() as stack:
        with world.together():
            device = choose_device(config.device, local_rank(world))
            dtype = DTYPES[world.first(lambda: name_of(choose_dtype(config.dtype, device)))]
            check_parallel(config, world, dtype)
            if world.leads:
                refuse_existing(out_dir, overwrite)
                if out_dir.resolve() == Path(config.data_dir or default_folder(config)).resolve():
                    raise UserError(
                        f"out_dir = {out_dir}: is the folder of the token files; choose another for the run"
                    )
                storage.check_writable(out_dir)
            weights = given = None
            if config.init_from:
                config, weights, given = starting_point(config, say)
            world.gather(None)  # the leader was content so far
            data, tokenizer = open_text(config, say, progress, given, world)
            if weights is None:
                vocab_size = config.vocab_size or data.vocab_size
                config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
            else:
                check_tokens(config, data, given, tokenizer)
            prompt = config.sample_prompt or default_prompt(data, tokenizer)
            if tokenizer is not None:
                tokenizer.encode(prompt)  # says now if it has a character that is not in the vocabulary
            config = resolved(config, data, dtype, prompt)
            agree(config, data, device, world)
        parts = build(config, data, tokenizer, device, dtype, world, weights)
        with world.together():
            if world.leads:
                storage.check_writable(out_dir, disk_needed(parts.model, config))
                stack.enter_context(storage.locked(out_dir, "this run folder"))
                refuse_existing(out_dir, overwrite)
                clear(out_dir)
                storage.write_text(out_dir / "config.toml", write_toml(config))
                write_environment(out_dir, data)
                if tokenizer is not None:
                    save_tokenizer(tokenizer, out_dir / "tokenizer.json")
                say_limits(say)
            world.begun()
        connect(parts, say)
        yield LiveRun(parts, out_dir, Progress(), prompt)


def resolved(config: TrainConfig, data: TokenData, dtype: torch.dtype, prompt: str) -> TrainConfig:
    """The config with everything that was chosen for it written out, so that a resume chooses nothing anew."""
    chosen = {
        "data_dir": beside(data.folder, Path(config.out_dir)),
        "vocab_size": config.model.vocab_size,
        "warmup_steps": config.warmup,
        "min_lr": config.final_lr,
        "dtype": name_of(dtype),
        "sample_prompt": prompt,
    }
    return from_settings(chosen, config)


def name_of(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)
