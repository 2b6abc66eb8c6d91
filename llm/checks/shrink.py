"""Make the small run of a rehearsal: the same settings with a small model, and the first piece of the text."""

import math
from pathlib import Path

from llm.config import TrainConfig, from_settings, to_settings
from llm.config.recipe import TRAIN_FIELDS
from llm.prepare.prepare import prepare
from llm.start.run_folder import Say
from llm.text import compressed, corpus
from llm.text.text_file import File
from llm.tokens.tokenizer import Tokenizer

# upper limits of the small model
N_LAYER = 2
N_EMBD = 64  # or one channel per head, if there are more heads
BLOCK_SIZE = 32

WINDOWS = 2  # in a micro-batch of the small run

# of the small run, which saves and evaluates this often
STEPS = 16
SAVE_EVERY = 4
EVAL_EVERY = 8

EVAL_TOKENS = 3 * 2048  # three batches, so that two processes get unequal shares

PIECE = 200_000  # characters of a text without token files


def shrink_config(config: TrainConfig, nproc: int, world_size: int) -> TrainConfig:
    """Return `config` with a model and a run that take seconds on the CPU of this machine.

    What can break stays: how processes share the work, precision (except with Muon), dropout, heads, biases, the
    vocabulary, clipping, the shape of the schedule, and whether a process accumulates several micro-batches or has only
    a part of one.
    """
    model = config.model
    head_size = min(model.head_size, max(1, N_EMBD // model.n_head))
    if model.arch == "llama":  # RoPE turns channels in pairs
        head_size = max(2, head_size // 2 * 2)
    batch_size, micro_batches = _shrink_batch(config, nproc, world_size)
    settings = {
        "n_layer": min(N_LAYER, model.n_layer),
        "n_embd": model.n_head * head_size,
        "ffn_dim": None,
        "head_dim": None,
        "block_size": min(BLOCK_SIZE, model.block_size),
        "batch_size": batch_size,
        "gradient_accumulation_steps": micro_batches,
        "max_steps": STEPS,
        "warmup_steps": min(STEPS - 1, math.ceil(STEPS * config.warmup / config.max_steps)),
        "eval_every": EVAL_EVERY,
        "eval_tokens": min(EVAL_TOKENS, config.eval_tokens),
        "save_every": SAVE_EVERY,
        "log_every": 1,
        "keep": min(2, config.keep),
        "sample_tokens": min(5, config.sample_tokens),
        "sample_prompt": None,
        "device": "cpu",
        # Muon gives the rounding of a gradient the size of an update: equal runs in bfloat16 are soon updates apart
        "dtype": "float32" if config.optimizer == "muon" else config.dtype,
        "compile": False,
        "init_from": None,
        "teacher": (),
        "teacher_share": TRAIN_FIELDS["teacher_share"].default,
        "max_time": None,
        "patience": None,
    }
    return from_settings(settings, config)


def _shrink_batch(config: TrainConfig, nproc: int, world_size: int) -> tuple[int, int]:
    """Return the (batch_size, gradient_accumulation_steps) of the small run.

    Each of its `nproc` processes gets micro-batches of the kind that each of `world_size` processes gets: a part of
    one, a whole one, several, or several of which the last is smaller.
    """
    batch_size = config.batch_size
    share = max(1, config.windows_per_step // world_size)
    if share < batch_size:
        return WINDOWS * nproc, 1
    if share % batch_size == 0:
        return WINDOWS, nproc * min(2, share // batch_size)
    divisor = next(number for number in range(2, nproc + 1) if nproc % number == 0)
    return divisor, nproc * (divisor + 1) // divisor  # divisor + 1 windows for each process


def describe_changes(config: TrainConfig, small: TrainConfig) -> list[str]:
    """Return 'name before -> after' for each setting that was changed."""
    before = to_settings(config)
    after = to_settings(small)
    changed = [name for name in before if before[name] != after.get(name)]
    return [f"{name} {before[name]} -> {after.get(name, 'none')}" for name in changed]


def prepare_first_piece(
    config: TrainConfig, folder: Path, given: Tokenizer | None, block_size: int, say: Say
) -> tuple[Path, bool]:
    """Make token files of the first PIECE characters of the text in `folder`.

    `given`: the tokenizer to use, if the run has one already. Returns (folder of the token files, whether they hold the
    whole text).
    """
    text_folder = folder / "text"
    text_folder.mkdir()
    files: list[Path] = []
    left = PIECE
    tokenizer: str = config.tokenizer
    with corpus.opened(config.text, limit=PIECE, text_field=config.text_field) as source:
        if source.missing:
            say(f"{source.missing}. Rehearsing on the help topics that Python carries instead")
            if tokenizer == "auto":
                tokenizer = "bpe"
        for number, file in enumerate(source.files):
            if left <= 0:
                break
            text = _read_start(file, left)
            left -= len(text)
            name = Path(file.label).name
            if Path(name).suffix.lower() in compressed.SUFFIXES:
                name = name.rpartition(".")[0]
            path = text_folder / f"{number:06d}-{name}{'.txt' if file.in_rows else ''}"
            path.write_text(text, encoding="utf-8", newline="")
            files.append(path)
    prepare(
        tuple(map(str, files)),
        folder / "tokens",
        tokenizer,
        config.vocab_size,
        config.val_fraction,
        say=say,
        block_size=block_size,
        given=given,
    )
    return folder / "tokens", left > 0


def _read_start(file: File, limit: int) -> str:
    """Return the first `limit` characters of a file; if its text is in rows, one row per line."""
    text = ""
    for piece in file.read():
        text += piece + ("\n" if file.in_rows else "")
        if len(text) >= limit:
            break
    return text[:limit]
