"""Before the first step: what a run will take, and what to run in a given time.

The arithmetic (parameters, memory, disk, FLOPs, Chinchilla) touches no machine; `probe` times this one, and `propose`
uses both. docs/plan.md says where each number comes from and how far off it was. n: tokens of a micro-batch.
"""

import contextlib
import dataclasses
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llm import corpus, hub, storage
from llm.config import GPTConfig, TrainConfig, from_settings, write_toml
from llm.data import TokenData
from llm.device import choose_device, choose_dtype, precision
from llm.errors import Failure, UserError
from llm.evaluate import WINDOW_TOKENS, evaluate
from llm.generate import generate
from llm.loss import chunk_rows
from llm.model import SHORT
from llm.prepare import default_folder, prepare
from llm.start import build
from llm.state import Parts
from llm.tokens import GPT2_VOCAB, check_length, has_tokens, read_meta, vocabulary_of
from llm.train import train_step

MIB = 2**20
COPIES = 16  # bytes a parameter while a state is saved: weights and moments, and the weights once more as model.pt
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022: compute-optimal for text that is read once
# measured, on the configurations that benchmarks/plan.py calls tuned
PROCESS = 350 * MIB  # Python, PyTorch, Matplotlib, the tokenizer and their scratch space
STARTING = 2.3  # seconds of imports, opening the text and the first step's setting up
PICTURE = 0.2  # seconds of drawing the curve, at each evaluation
WRITING = 500 * MIB  # bytes a second of copying, hashing and writing a state
READING = 10 * MIB  # bytes a second of text to token files
BYTES_PER_TOKEN = {"gpt2": 3.3, "auto": 3.3, "bpe": 3.2, "byte": 1.0, "char": 1.0}  # of tiny Shakespeare
VOCABULARY = {"gpt2": GPT2_VOCAB, "auto": GPT2_VOCAB, "bpe": 4096, "byte": 257, "char": 65}
TEXT_BYTES = 1_115_394  # of tiny Shakespeare, the default text
# what a proposal is made of; shapes are (layers, width, heads)
PROBE_SECONDS = 3.0
SHAPES = ((2, 64, 2), (4, 128, 4), (6, 192, 6), (6, 256, 8), (6, 384, 6), (8, 512, 8), (12, 768, 12))
STEP_TOKENS, STEPS = 2048, 2500  # in a batch: the chapter's, or fewer so that EPOCHS passes make about so many steps
EVALUATIONS = 10  # besides the one at the start
EPOCHS = 40  # passes over the text after which more give little (Muennighoff et al. 2023)
PATIENCE = 3  # evaluations in a row without improvement that end it: many a text is learned by heart sooner
SHARE = 0.9  # of the time given that a proposal fills
LEAST = 20  # steps
FEW = 10  # windows of estimated tokens, below which a text is tokenized to see whether it is too short


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


def memory(config: TrainConfig) -> dict[str, int]:
    """Bytes at peak by part: of the process on a CPU, else what lies on the card.

    Raises UserError for a device that is not there.
    """
    device = choose_device(config.device)
    return memory_on(device.type == "cpu", choose_dtype(config.dtype, device).itemsize, config)


def memory_on(on_cpu: bool, size: int, config: TrainConfig) -> dict[str, int]:
    """As `memory`, of any machine; `size` is the bytes of a number in the precision of the products."""
    model, low = config.model, size != 4
    count, table = sum(parameters(model).values()), model.vocab_size * model.n_embd
    n = config.batch_size * model.block_size
    rows = min(n, chunk_rows(n, model.vocab_size, size, on_cpu))
    # the embedding's gradient takes the place of the exponentials; tied, the head's joins it, else it is counted below
    loss = max(rows * model.vocab_size * size, 4 * table) - (0 if model.tied_lm_head else 4 * table)
    loss += n * model.n_embd * 8  # and the hidden states' gradient, and sums
    # kept for the backward pass of a block: the stream before each of its halves, in float32; in the precision of the
    # products both normed copies, queries, keys, values, what attention gives, and the feed-forward layer before and
    # after its GELU
    layer = n * model.n_embd * (8 + size * (2 * model.ffn_mult + 6))
    if model.dropout > 0 or (on_cpu and low and 1 < model.block_size <= SHORT):  # attention by plain operations
        layer += (3 if model.dropout > 0 else 1) * n * model.block_size * model.n_head * size
    if model.dropout > 0:
        layer += 2 * n * model.n_embd * size
    passing = n * model.n_embd * 4 * (2 * model.ffn_mult + 8)  # a block's gradients on their way back, about
    found = {
        "weights": 4 * count,
        "gradients": 4 * count,
        "optimizer state": 8 * count,
        "low-precision copies": size * (parameters(model)["blocks"] + (0 if on_cpu else table)) if low else 0,
        "loss": loss,
        "activations": model.n_layer * layer + passing,
    }
    if on_cpu:
        found |= {"copies being saved": COPIES * count, "process": PROCESS}
    return found


def machine_memory() -> int | None:
    """Bytes of memory of this machine, or of the container it is; None where the system does not say."""
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
    try:
        return min(found, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return found


def peak_memory() -> int | None:
    """Bytes that this process held at most; None where the system does not say."""
    try:
        if sys.platform == "linux":  # whose getrusage counts what a parent held before it became this process
            status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
            return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    except (ImportError, OSError, IndexError):
        return None


def disk(config: TrainConfig, tokens: int) -> dict[str, int]:
    """Bytes of a run when it is done, by part; `tokens` are those of the training split."""
    count = sum(parameters(config.model).values())
    kept = min(config.keep + 1, 1 + evaluations(config))  # the newest and the best
    each = 4 if config.model.vocab_size > 2**16 else 2
    return {
        "states": kept * 12 * count,  # weights and two moments, float32
        "model.pt and best.pt": 2 * 4 * count,
        "token files": round(each * tokens / (1 - config.val_fraction)),
    }


def evaluations(config: TrainConfig) -> int:
    """How often a run evaluates, at its start and its end included."""
    return 1 + math.ceil(config.max_steps / config.eval_every)


def optimal_parameters(flops: float) -> float:
    """The size that is best for so much work, by Hoffmann et al. 2022: flops = 6 N D with D = 20 N tokens."""
    return math.sqrt(flops / (6 * TOKENS_PER_PARAMETER))


@dataclass(frozen=True)
class Text:
    """What a run would be trained on."""

    tokens: int  # of the training split
    vocabulary: int
    unprepared: int = 0  # bytes still to be tokenized, so that the tokens are an estimate; 0: they were counted


def text_of(config: TrainConfig) -> Text:
    """The text of a run: counted where its token files are there, else estimated by the size of what they would be
    made from (a character tokenizer's exactly: it is read).

    Raises UserError for a text that is not there, is empty or cannot be read, and for a meta.json that is damaged.
    """
    folder, given = Path(config.data_dir or default_folder(config)), config.vocab_size
    if has_tokens(folder):
        meta = read_meta(folder)
        vocabulary = vocabulary_of(folder, meta, given)
        tokens = check_length(folder, "train", meta, config.model.block_size)
        check_length(folder, "val", meta, config.model.block_size)
        return Text(tokens, given or vocabulary)
    if config.data_dir and not config.text:
        raise UserError(f"data_dir = {config.data_dir}: no train.bin there; name a text with --text")
    words = config.text or (corpus.SHAKESPEARE,)
    named = (corpus.SHAKESPEARE, *hub.TEXTS)  # which need not be downloaded for this
    files = tuple(word for word in words if word not in named)
    taken = config.text_limit or hub.TEXT_LIMIT
    size = count = sum(taken if word in hub.TEXTS else TEXT_BYTES for word in words if word in named)
    vocabulary = VOCABULARY[config.tokenizer]
    if files:
        with corpus.opened(files, text_field=config.text_field) as source:
            size += sum(file.text_bytes() for file in source.files)
            if config.tokenizer == "char":
                survey = corpus.look(source, alphabet=True)
                count, vocabulary = count + survey.total, len(survey.alphabet)
    if config.tokenizer != "char":
        count = int(size / BYTES_PER_TOKEN[config.tokenizer])
    tokens = int(count * (1 - config.val_fraction))
    if tokens < FEW * config.model.block_size and all(Path(word).is_file() or Path(word).is_dir() for word in words):
        check_short(config)
    if tokens == 0:
        raise UserError("text: there is nothing in it to train on; give more")
    return Text(tokens, given or vocabulary, size)


def check_short(config: TrainConfig) -> None:
    """Raises UserError for a text that is too short to train on, as its preparation does: by trying it."""
    settings = (config.tokenizer, config.vocab_size, config.val_fraction)
    absent = contextlib.suppress(Failure)  # of GPT-2's vocabulary, which is not downloaded for this
    with tempfile.TemporaryDirectory(prefix="losscurve-") as folder, absent:
        prepare(
            config.text,
            Path(folder) / "data",
            *settings,
            offline=True,
            block_size=config.model.block_size,
            text_field=config.text_field,
        )


def with_vocabulary(config: TrainConfig, size: int) -> TrainConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def fits(config: TrainConfig) -> bool:
    """Whether a probe of one window finds room in this machine's memory; that of a GPU is not asked."""
    if choose_device(config.device).type != "cpu":
        return True
    held = memory(from_settings({"batch_size": 1}, config))
    return sum(held.values()) - held["copies being saved"] < (machine_memory() or math.inf)


@dataclass(frozen=True)
class Pace:
    """What was measured here, in seconds."""

    step: float
    evaluated_token: float
    sampled_token: float


def probe(config: TrainConfig) -> Pace:
    """Time real steps, windows of an evaluation and sampled tokens of `config` on random tokens, for a few seconds.

    Without torch.compile, which takes longer than the probe.
    """
    device = choose_device(config.device)
    block, vocabulary = config.model.block_size, config.model.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocabulary, max(100_000, 2 * block)).astype(np.uint32)
    data = TokenData(Path(), tokens, tokens[: max(WINDOW_TOKENS, block) + 1], vocabulary, True, "random", {})
    parts = build(config, data, None, device, choose_dtype(config.dtype, device))
    return Pace(_stepping(parts), _evaluating(parts), _sampling(parts))


def _median(work: Callable[[int], object], seconds: float) -> float:
    """Seconds of `work`, which is given 1, 2, …, repeated for about so long and at least once."""
    times: list[float] = []
    while not times or (sum(times) < seconds and len(times) < 500):
        start = time.perf_counter()
        work(len(times) + 1)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _stepping(parts: Parts) -> float:
    """Seconds of a step. A long one is counted up from fewer windows and micro-batches: the time of a step is that of
    its optimizer, and as many times that of a window as there are windows. What is counted up is the best of several
    measured in turn, since one that other work held up would count as many times.
    """
    config = parts.config

    def smaller(windows: int, micro_batches: int) -> Parts:
        few = from_settings({"batch_size": windows, "gradient_accumulation_steps": micro_batches}, config)
        return dataclasses.replace(parts, config=few)

    def timed(smaller_parts: Parts, number: int) -> float:
        start = time.perf_counter()
        train_step(smaller_parts, number).loss.item()
        return time.perf_counter() - start

    parts.model.train()
    windows, one = 0, 0.0
    while windows < config.batch_size and one < PROBE_SECONDS / 10:
        windows = min(max(1, 4 * windows), config.batch_size)
        single = smaller(windows, 1)
        one = min(timed(single, number) for number in range(3))  # the first sets up
    if windows == config.batch_size and one * config.gradient_accumulation_steps < PROBE_SECONDS / 2:
        train_step(parts, 0).loss.item()  # sets up
        return _median(lambda number: train_step(parts, number).loss.item(), PROBE_SECONDS)
    double, two = smaller(windows, 2), math.inf
    began, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - began < PROBE_SECONDS:
        one = min(one, timed(single, rounds))
        two = min(two, timed(double, rounds))
        rounds += 1
    if two <= one:  # other work ended in between: count the optimizer as often as a window
        one = two / 2
    return one + (two - one) * (config.windows_per_step / windows - 1)


def _evaluating(parts: Parts) -> float:
    val, block = parts.data.val, parts.config.model.block_size
    with precision(parts.dtype, parts.device):
        evaluate(parts.model, val, block, len(val))
        return _median(lambda _: evaluate(parts.model, val, block, len(val)), 0.5) / (len(val) - 1)


def _sampling(parts: Parts) -> float:
    count, prompt = 30, torch.zeros(1, 1, dtype=torch.int64, device=parts.device)
    with precision(parts.dtype, parts.device):
        return _median(lambda _: list(generate(parts.model, prompt, count)), 0.5) / count


def run_seconds(config: TrainConfig, text: Text, pace: Pace) -> dict[str, float]:
    """Seconds of a run by part, at a measured pace."""
    times, steps = evaluations(config), config.max_steps * pace.step
    validated = min(text.tokens * config.val_fraction / (1 - config.val_fraction), config.eval_tokens)
    every = config.save_every or config.eval_every
    saves = 2 + (steps / every if isinstance(every, float) else config.max_steps / every)
    return {
        "steps": steps,
        "evaluation": times * validated * pace.evaluated_token,
        "samples": times * config.sample_tokens * pace.sampled_token,
        "pictures": times * PICTURE,
        "saving": saves * 16 * sum(parameters(config.model).values()) / WRITING,
        "starting": STARTING + text.unprepared / READING,
    }


def expected_loss(blocks: float, tokens: float, text: float) -> float:
    """What `tokens` of training, drawn from `text` distinct ones, leave to learn for a model of so many parameters, in
    nats per token above the entropy of the text.

    By the law that Muennighoff et al. 2023 fitted to far larger models. Only which of two is lower is asked of it
    here: its level belongs to their texts and tokens.
    """
    fresh = min(text, tokens)
    suited = min(blocks, 0.051 * fresh)  # the parameters that so much text is compute-optimal for
    worth = fresh * (1 + 15.4 * -math.expm1(-(tokens / fresh - 1) / 15.4))  # a token read again is worth less, and
    size = suited * (1 + 5.3 * -math.expm1(-(blocks / suited - 1) / 5.3))  # so are more parameters than it suits
    return float(521 / size**0.353 + 1488 / worth**0.353)


def propose(
    config: TrainConfig, text: Text, seconds: float, measure: Callable[[TrainConfig], Pace] = probe
) -> tuple[TrainConfig, Pace]:
    """A run of `config`'s text that fits `seconds`: its shape, batch, steps and rates, and the pace measured for it.

    From the smallest on, a shape of SHAPES is measured and given as many steps as fit; the next one is taken while it
    promises an `expected_loss` at least 1 % lower. Only the parameters of the blocks count: embeddings are looked up.
    Raises UserError where not even LEAST steps of the smallest fit.
    """
    chosen, lowest = None, math.inf
    for shape in SHAPES:
        trial = shaped(config, shape, text)
        if not fits(trial):
            break
        pace = measure(trial)
        fitted = with_steps(trial, text, seconds, pace)
        if fitted.max_steps < LEAST:
            break
        tokens = fitted.max_steps * fitted.tokens_per_step
        loss = expected_loss(parameters(fitted.model)["blocks"], tokens, text.tokens)
        if loss > 0.99 * lowest:
            break
        chosen, lowest = (fitted, pace), loss
    if chosen is None:
        raise UserError(f"time = {seconds:g} s: too short for {LEAST} steps of the smallest model here; give more time")
    return chosen


def shaped(config: TrainConfig, shape: tuple[int, int, int], text: Text) -> TrainConfig:
    """`config` with a shape of SHAPES, and the batch and rate that go with it.

    The peak rate falls as 1 / width (Yang et al. 2022) through the 1e-3 that nanoGPT takes for a width of 384, and
    near the 6e-4 of Brown et al. 2020 for 768; 3e-3 at most.
    """
    layers, width, heads = shape
    tokens = min(STEP_TOKENS, EPOCHS * text.tokens // STEPS)
    settings: dict[str, float | None] = {
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
        "batch_size": max(1, tokens // config.model.block_size),
        "gradient_accumulation_steps": 1,
        "max_lr": min(3e-3, float(f"{0.384 / width:.2g}")),
        "min_lr": None,
        "warmup_steps": None,
        "patience": PATIENCE,
    }
    return from_settings(settings, config)


def with_steps(config: TrainConfig, text: Text, seconds: float, pace: Pace) -> TrainConfig:
    """`config` with as many steps as fit at that pace, or EPOCHS passes over the text if those are fewer.

    Validation takes a tenth of the time at most, by `eval_tokens`.
    """
    validated = 0.1 * seconds / ((1 + EVALUATIONS) * pace.evaluated_token)
    config = from_settings({"eval_tokens": max(1, min(config.eval_tokens, int(validated)))}, config)

    def steps(count: int) -> TrainConfig:
        return from_settings({"max_steps": count, "eval_every": math.ceil(count / EVALUATIONS)}, config)

    parts = run_seconds(steps(EVALUATIONS), text, pace)
    left = SHARE * seconds - (sum(parts.values()) - parts["steps"])
    enough = max(LEAST, EPOCHS * text.tokens / config.tokens_per_step)
    return steps(max(1, int(min(left / pace.step, enough, 1e9))))


def write(config: TrainConfig, path: Path) -> None:
    """The settings as a new file that `--preset` takes. Raises UserError where it cannot be written."""
    check_new(path)
    try:
        storage.write_text(path, write_toml(config))
    except OSError as error:
        raise UserError(f"out = {path}: cannot be written ({error.strerror}); choose another place") from None


def check_new(path: Path) -> None:
    """Raises UserError if `write` would refuse the name."""
    if path.suffix != ".toml":
        raise UserError(f"out = {path}: give it the ending .toml, which --preset asks for")
    if path.exists():
        raise UserError(f"out = {path}: is there already; remove it, or choose another name")


def short(number: float) -> str:
    """Three digits: '0.0502', '13.2', '294,000', and from a million on '1.23e+06'."""
    return f"{float(f'{number:.3g}'):,g}"


def spoken(seconds: float) -> str:
    """'48 s', '16.5 min', '3.4 h' or '12.1 days'."""
    for unit, size, limit in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < limit * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:,.1f} days"


def outline(config: TrainConfig, tokens: int) -> str:
    """Two lines for the start of a run, without a probe: its memory, disk, work and tokens per parameter."""
    space, files = sum(memory(config).values()), sum(disk(config, tokens).values())
    ratio = config.max_steps * config.tokens_per_step / sum(parameters(config.model).values())
    return (
        f"about {space / MIB:,.0f} MiB of memory and {files / MIB:,.0f} MiB of disk; {run_flops(config):.2g} FLOPs\n"
        f"{short(ratio)} tokens per parameter (Chinchilla: {TOKENS_PER_PARAMETER}); "
        f"read once, the text suits {short(tokens / TOKENS_PER_PARAMETER / 1e6)} M parameters"
    )


class Forecast:
    """A run's own prediction: once its pace is known it says how long the whole will take, and at the end how far off
    that and the memory of its plan were.
    """

    STEPS, SECONDS = 20, 5.0  # after which the pace counts as known

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.first: tuple[int, float] | None = None  # step, and seconds of steps until then
        self.predicted: float | None = None  # seconds

    def at(self, step: int, seconds: float, bookkeeping: float) -> str | None:
        """A line once the pace is known, else None; to be asked after each step, with the seconds since the run began
        and those of them that were spent on anything but steps.
        """
        stepping, config = seconds - bookkeeping, self.config
        if self.first is None:
            self.first = step, stepping  # the first step sets up
        done, took = step - self.first[0], stepping - self.first[1]
        if self.predicted is not None or done < self.STEPS or took < self.SECONDS:
            return None
        told = 1 + (step - 1) // config.eval_every
        aside = (evaluations(config) - told) * bookkeeping / told
        whole = seconds + (config.max_steps - step) * took / done + aside
        self.predicted = min(whole, config.max_time or math.inf)
        return f"at {took / done:.2g} s a step, this run will take about {spoken(self.predicted)}"

    def ended(self, seconds: float) -> str | None:
        """What became of the prediction, for a run that came to its end; None if it was too short for one."""
        if self.predicted is None:
            return None
        found = f"predicted {spoken(self.predicted)}, took {spoken(seconds)}: {_off(self.predicted, seconds)}"
        held = memory(self.config)
        if "process" in held and (peak := peak_memory()):
            space = sum(held.values())
            found += f"; {space / MIB:,.0f} MiB, took {peak / MIB:,.0f} MiB: {_off(space, peak)}"
        return found


def _off(predicted: float, truth: float) -> str:
    error = predicted / truth - 1
    return f"{abs(error):.0%} too {'high' if error > 0 else 'low'}" if abs(error) >= 0.005 else "right"
