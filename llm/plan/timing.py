"""How long a run takes on this machine: real steps, evaluations and samples, timed for a few seconds."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llm.config import TrainConfig, from_settings
from llm.data import TokenData
from llm.evaluate import WINDOW_TOKENS, evaluate
from llm.generate import generate
from llm.machine.device import choose_device, choose_dtype, precision
from llm.plan.arithmetic import MIB, evaluations, machine_memory, memory, parameters
from llm.plan.text_size import Text
from llm.start.build import build
from llm.train import train_step
from llm.training.parts import Parts

STARTING = 2.3  # seconds of imports, opening the text and the first step's setting up


PICTURE = 0.2  # seconds of drawing the curve, at each evaluation


WRITING = 500 * MIB  # bytes a second of copying, hashing and writing a state


READING = 10 * MIB  # bytes a second of text to token files


# what a proposal is made of; shapes are (layers, width, heads)
PROBE_SECONDS = 3.0


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
