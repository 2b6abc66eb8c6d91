"""Before the first step: what a run will take, and what to run in a given time.

The arithmetic (parameters, memory, disk, FLOPs, Chinchilla) touches no machine; `probe` times this one, and `propose`
uses both. N parameters, V vocabulary, C n_embd, L n_layer, T block_size, n tokens of a micro-batch.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llm import storage
from llm.config import GPTConfig, TrainConfig, from_settings, write_toml
from llm.data import TokenData, read_meta
from llm.device import choose_device, choose_dtype, precision
from llm.errors import UserError
from llm.evaluate import WINDOW_TOKENS, evaluate
from llm.generate import generate
from llm.loss import ROWS_BYTES
from llm.model import SHORT
from llm.prepare import default_folder
from llm.start import build
from llm.state import Trainer
from llm.train import train_step

MIB = 2**20
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022: compute-optimal for text that is not seen twice
PROCESS = 450 * MIB  # Python, PyTorch, Matplotlib and their scratch space, of a run of a tiny model
STARTING = 4.0  # seconds of imports, opening the text and the first save
PICTURE = 0.35  # seconds of drawing the curve, at each evaluation
WRITING = 500 * MIB  # bytes a second of copying, hashing and writing a state
PROBE_SECONDS = 6.0
EPOCHS = 8  # times a proposal reads its text: beyond about 4 each pass gives less (Muennighoff et al. 2023)
SHARE = 0.85  # of the time given that a proposal fills: a machine has other things to do
TEXT_BYTES = 1_115_394  # of tiny Shakespeare, the default text
BYTES_PER_TOKEN = {"gpt2": 3.3, "auto": 3.3, "bpe": 3.0, "byte": 1.0, "char": 1.0}
VOCABULARY = {"gpt2": 50257, "auto": 50257, "bpe": 4096, "byte": 257, "char": 65}
# shapes a proposal chooses from, (n_layer, n_embd, n_head): heads of 32 or 64, depth growing with width
SHAPES = ((2, 64, 2), (4, 128, 4), (6, 192, 6), (6, 256, 8), (6, 384, 6), (8, 512, 8), (12, 768, 12))


def parameters(config: GPTConfig) -> dict[str, int]:
    """Parameters by part. A tied head has none of its own."""
    width, wide = config.n_embd, config.ffn_mult * config.n_embd
    attention = 4 * width * width + (4 * width if config.bias else 0)
    feed_forward = 2 * width * wide + wide + width
    return {
        "embedding": config.vocab_size * width,
        "positions": config.block_size * width,
        "blocks": config.n_layer * (attention + feed_forward + 4 * width) + 2 * width,  # the last norm too
        "head": 0 if config.tied_lm_head else config.vocab_size * width,
    }


def flops_per_token(config: GPTConfig) -> float:
    """Of forward and backward: as `GPT.flops_per_token`, without building the model."""
    block = (4 + 2 * config.ffn_mult) * config.n_embd**2
    weights = config.n_layer * block + config.vocab_size * config.n_embd
    return 6.0 * weights + 12.0 * config.n_layer * config.n_embd * config.block_size


def run_flops(config: TrainConfig) -> float:
    """Of all the steps of a run; its evaluations are not counted."""
    return flops_per_token(config.model) * config.tokens_per_step * config.max_steps


def memory(config: TrainConfig, dtype: torch.dtype) -> dict[str, int]:
    """Bytes at peak by part, on a CPU, with products in `dtype`."""
    model, size = config.model, dtype.itemsize
    count, table = sum(parameters(model).values()), model.vocab_size * model.n_embd
    n = config.batch_size * model.block_size
    low = size != 4
    chunks = math.ceil(n * model.vocab_size * size / ROWS_BYTES)
    rows = math.ceil(n / min(n, chunks))  # as llm.loss cuts them
    loss = rows * model.vocab_size * size + n * model.n_embd * 8  # and the hidden states' gradient, and sums
    loss += 4 * table if model.tied_lm_head else 0  # the head's own gradient, before it joins the embedding's
    # kept for the backward pass: two streams and two norms in float32; in `dtype` the queries, keys, values, what
    # attention gives (twice: it is laid out anew) and the feed-forward layer before and after its GELU
    wide = 2 * model.ffn_mult + 5
    layer = n * model.n_embd * (16 + size * wide + (2 * size if low else 0))
    if (low and 1 < model.block_size <= SHORT) or model.dropout > 0:  # attention by plain operations
        layer += (1 if model.dropout == 0 else 3) * n * model.block_size * model.n_head * size
    if model.dropout > 0:
        layer += 2 * 2 * n * model.n_embd * 4
    return {
        "weights": 4 * count,
        "gradients": 4 * count,
        "optimizer state": 8 * count,
        "copies being saved": 20 * count,  # of weights and moments, and the moments once more as a file's bytes
        "low-precision copies": size * count if low else 0,
        "loss": loss,
        "activations": model.n_layer * layer + 4 * n * model.n_embd * 4,
        "process": PROCESS,
    }


def disk(config: TrainConfig, tokens: int) -> dict[str, int]:
    """Bytes of a run when it is done, by part; `tokens` of training text (0: not known)."""
    count = sum(parameters(config.model).values())
    state = 12 * count  # weights and two moments, float32
    saves = 2 + evaluations(config)
    kept = min(config.keep + 1, saves)  # the newest and the best
    each = 4 if config.model.vocab_size > 2**16 else 2
    return {
        "states": kept * state,
        "model.pt and best.pt": 2 * 4 * count,
        "token files": round(each * tokens / (1 - config.val_fraction)),
    }


def evaluations(config: TrainConfig) -> int:
    """How often a run evaluates, at its start and its end included."""
    return 1 + math.ceil(config.max_steps / config.eval_every)


@dataclass(frozen=True)
class Chinchilla:
    """What Hoffmann et al. 2022 find best: parameters N and tokens D with D = 20 N, and compute 6 N D."""

    parameters: float
    tokens: float


def optimal_for_tokens(tokens: float) -> Chinchilla:
    return Chinchilla(tokens / TOKENS_PER_PARAMETER, tokens)


def optimal_for_flops(flops: float) -> Chinchilla:
    """Of `flops` = 6 N D and D = 20 N."""
    count = math.sqrt(flops / (6 * TOKENS_PER_PARAMETER))
    return Chinchilla(count, TOKENS_PER_PARAMETER * count)


def text_tokens(config: TrainConfig) -> tuple[int | None, int, bool]:
    """(training tokens, vocabulary, whether both were read from prepared files rather than estimated).

    Estimates are by the size of the text's files; None where that is not known. Raises UserError for a text that
    is not there, and for a meta.json that is damaged.
    """
    folder = Path(config.data_dir or default_folder(config))
    if (folder / "train.bin").is_file():
        meta = read_meta(folder)
        each = 4 if meta and meta["dtype"] == "uint32" else 2
        vocabulary = meta["vocab_size"] if meta else VOCABULARY["gpt2"]
        return (folder / "train.bin").stat().st_size // each, config.vocab_size or vocabulary, True
    size = 0
    for name in config.text or ("shakespeare",):
        path = Path(name)
        if name == "-":
            return None, config.vocab_size or VOCABULARY[config.tokenizer], False
        if path.is_dir():
            size += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        elif path.is_file():
            size += path.stat().st_size
        elif name == "shakespeare":
            size += TEXT_BYTES
        else:
            raise UserError(f"text = {name}: no such file or folder")
    tokens = int(size * (1 - config.val_fraction) / BYTES_PER_TOKEN[config.tokenizer])
    return tokens, config.vocab_size or VOCABULARY[config.tokenizer], False


def with_vocabulary(config: TrainConfig, size: int) -> TrainConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


@dataclass(frozen=True)
class Pace:
    """What was measured here, in seconds."""

    step: float
    evaluated_token: float
    sampled_token: float


def probe(config: TrainConfig, seconds: float = PROBE_SECONDS) -> Pace:
    """Time real steps, windows of an evaluation and sampled tokens of `config` on random tokens, for about `seconds`.

    The first step, which sets up, is not counted; at least one more is made, however long it takes.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    block, vocabulary = config.model.block_size, config.model.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocabulary, max(100_000, 2 * block)).astype(np.uint32)
    data = TokenData(Path(), tokens, tokens[: max(WINDOW_TOKENS, block) + 1], vocabulary, True, "random", {})
    trainer = build(config, data, None, device, dtype)
    trainer.model.train()
    train_step(trainer, 0).loss.item()
    step = _median(lambda number: train_step(trainer, number).loss.item(), seconds)
    return Pace(step, _evaluating(trainer), _sampling(trainer))


def _median(work: Callable[[int], object], seconds: float) -> float:
    times: list[float] = []
    while not times or (sum(times) < seconds and len(times) < 200):
        start = time.perf_counter()
        work(len(times) + 1)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _evaluating(trainer: Trainer) -> float:
    val, block = trainer.data.val, trainer.config.model.block_size
    with precision(trainer.dtype, trainer.device):
        evaluate(trainer.model, val, block, len(val))
        return _median(lambda _: evaluate(trainer.model, val, block, len(val)), 0.5) / (len(val) - 1)


def _sampling(trainer: Trainer) -> float:
    if trainer.config.sample_tokens == 0:
        return 0.0
    count, prompt = min(trainer.config.sample_tokens, 30), torch.zeros(1, 1, dtype=torch.int64, device=trainer.device)
    with precision(trainer.dtype, trainer.device):
        return _median(lambda _: list(generate(trainer.model, prompt, count)), 0.5) / count


def run_seconds(config: TrainConfig, tokens: int | None, pace: Pace) -> dict[str, float]:
    """Seconds of a run by part, at a measured pace; `tokens` of training text."""
    times = evaluations(config)
    text = (tokens or config.eval_tokens) * config.val_fraction / (1 - config.val_fraction)
    every = config.save_every or config.eval_every
    steps = config.max_steps * pace.step
    saves = 2 + (steps / every if isinstance(every, float) else config.max_steps / every)
    size = 16 * sum(parameters(config.model).values())
    return {
        "steps": steps,
        "evaluation": times * min(text, config.eval_tokens) * pace.evaluated_token,
        "samples": times * config.sample_tokens * pace.sampled_token,
        "pictures": times * PICTURE,
        "saving": saves * size / WRITING,
        "starting": STARTING,
    }


def propose(
    config: TrainConfig, tokens: int | None, seconds: float, measure: Callable[[TrainConfig], Pace] = probe
) -> tuple[TrainConfig, Pace]:
    """A run of `config`'s text that fits `seconds`: its shape, batch, steps and rates, and the pace measured for it.

    1. A pace is measured once, and the work of another shape scaled by its FLOPs.
    2. A run reads its text at most EPOCHS times: more is learned by heart.
    3. Of SHAPES the largest whose blocks still get 20 tokens a parameter; embeddings, only looked up, do not count.
    4. About 2,048 tokens a step, the chapter's: small models gain from more steps rather than larger ones.
    5. The peak rate is 1e-3 up to a width of 384 and falls as 1 / width beyond it, near what GPT-3 used (Brown et al.
       2020, table 2.1).
    6. The shape that was chosen is measured itself, and its steps are counted by that; SHARE of the time is filled.
    Raises UserError where not even ten steps fit.
    """
    limit = math.inf if tokens is None else float(EPOCHS * tokens)
    first = shaped(config, SHAPES[1])
    rate = flops_per_token(first.model) * first.tokens_per_step / measure(first).step
    chosen = shaped(config, SHAPES[0])
    for shape in SHAPES:
        trial = shaped(config, shape)
        affordable = min(limit, rate * seconds * SHARE / flops_per_token(trial.model))
        if affordable >= TOKENS_PER_PARAMETER * parameters(trial.model)["blocks"]:
            chosen = trial
    pace = measure(chosen)
    most = max(10, int(min(limit / chosen.tokens_per_step, seconds * SHARE / pace.step, 10**9)))
    for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.0):  # evaluations and the rest need room
        steps = max(10, int(most * share))
        fitted = from_settings({"max_steps": steps, "eval_every": max(1, steps // 10)}, chosen)
        if sum(run_seconds(fitted, tokens, pace).values()) <= seconds * max(SHARE, 0.9):
            return fitted, pace
    need = sum(run_seconds(fitted, tokens, pace).values())
    raise UserError(f"time = {seconds:g} s: ten steps of the smallest model take {need:.0f} s here; give more time")


def shaped(config: TrainConfig, shape: tuple[int, int, int]) -> TrainConfig:
    """`config` with a shape of SHAPES, and the batch and rate that go with it."""
    layers, width, heads = shape
    settings: dict[str, float | None] = {
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
        "gradient_accumulation_steps": 1,
    }
    settings |= {"batch_size": max(1, 2048 // config.model.block_size), "warmup_steps": None, "min_lr": None}
    return from_settings(settings | {"max_lr": float(f"{1e-3 * min(1.0, 384 / width):.2g}")}, config)


def write(config: TrainConfig, path: Path) -> None:
    """The settings as a file that `--preset` takes. Raises UserError where it cannot be written."""
    if path.suffix != ".toml":
        raise UserError(f"out = {path}: give it the ending .toml, which --preset asks for")
    try:
        storage.write_text(path, write_toml(config))
    except OSError as error:
        raise UserError(f"out = {path}: cannot be written ({error.strerror}); choose another place") from None


def outline(config: TrainConfig, tokens: int) -> str:
    """Two lines for the start of a run, without a probe: its memory, disk, work and tokens per parameter."""
    count = sum(parameters(config.model).values())
    dtype = choose_dtype(config.dtype, choose_device(config.device))
    space, files = sum(memory(config, dtype).values()), sum(disk(config, tokens).values())
    ratio = config.max_steps * config.tokens_per_step / count
    return (
        f"about {space / MIB:,.0f} MiB of memory and {files / MIB:,.0f} MiB of disk; {run_flops(config):.2g} FLOPs\n"
        f"{ratio:.2g} tokens per parameter, text counted each time it is read (Chinchilla: {TOKENS_PER_PARAMETER}; "
        f"this text alone suits {optimal_for_tokens(tokens).parameters / 1e6:.2g} M parameters)"
    )


class Forecast:
    """A run's own prediction: after SETTLED steps of its own it says how long the whole will take, and at the end how
    far off that was. `at` is given each finished step with the seconds since the run began."""

    SETTLED = 20

    def __init__(self, config: TrainConfig, step: int = 0, seconds: float = 0.0) -> None:
        self.config, self.began = config, (step, seconds)
        self.first: tuple[int, float] | None = None
        self.predicted: float | None = None

    def at(self, step: int, seconds: float, bookkeeping: float) -> str | None:
        """A line once the pace is known, else None. `bookkeeping`: seconds of these spent on anything but steps."""
        if self.first is None:
            self.first = step, seconds - bookkeeping  # the first step sets up
            return None
        if self.predicted is not None or step < self.first[0] + self.SETTLED:
            return None
        pace = (seconds - bookkeeping - self.first[1]) / (step - self.first[0])
        told = 1 + (step - self.began[0]) // self.config.eval_every
        left = math.ceil(self.config.max_steps / self.config.eval_every) - step // self.config.eval_every
        self.predicted = seconds + (self.config.max_steps - step) * pace + left * bookkeeping / told
        return f"at {pace:.3g} s a step this run will take about {self.predicted:.0f} s"

    def ended(self, seconds: float) -> str | None:
        """What became of the prediction; None if there was none."""
        if self.predicted is None:
            return None
        error = seconds / self.predicted - 1
        return f"predicted {self.predicted:.0f} s, took {seconds:.0f} s ({error:+.0%})"
