"""The time that a run takes on this machine, from a probe: real steps, evaluations and samples, for a few seconds."""

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llm.config import GPTConfig, TrainConfig, from_settings
from llm.config.counts import flops_per_token
from llm.data import TokenData
from llm.evaluate import WINDOW_TOKENS, evaluate
from llm.generate import generate
from llm.machine.device import choose_device, choose_dtype, fixed_order, precision
from llm.plan.arithmetic import (
    MIB,
    bytes_copied_to_save,
    count_evaluations,
    count_validations,
    machine_memory,
    memory,
)
from llm.plan.rule import STEP_GROWTH
from llm.plan.text_size import Text
from llm.prepare.choose_tokenizer import SAMPLE
from llm.start.build import build
from llm.train import train_step
from llm.training.evaluating import PICTURE_PACE
from llm.training.parts import Parts
from llm.training.predictions import uniform

STARTING_SECONDS = 2.3  # importing, opening the text, and the set-up in the first step

PICTURE_SECONDS = 0.2  # drawing the curve

SAVING_RATE = 500 * MIB  # bytes per second: copying, hashing and writing a checkpoint

TOKENIZING_RATE = 10 * MIB  # bytes per second: from text to token files

BPE_TRAINING_RATE = 5 * MIB  # bytes per second, before that, of at most the SAMPLE of `choose_tokenizer`

MEASURED_SECONDS = 3.0  # of steps

DISTURBING = 0.25  # of the cores: other work that takes more than this is told


def busy_line(pace: "Pace") -> str:
    """Return a line that says that other work distorts a measurement; "" if hardly any did."""
    if not pace.is_disturbed:
        return ""
    return (
        f"other work kept {pace.others:.1f} of {os.cpu_count()} cores busy while this machine was measured; the times "
        "assume that it continues"
    )


def seconds_of_others() -> float | None:
    """Return the processor seconds of all other processes since some moment; None if the system does not tell."""
    try:
        numbers = Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
    except OSError:  # not Linux
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, numbers)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


def fits(config: TrainConfig) -> bool:
    """Return whether a probe of one window fits in this machine's memory. A GPU's memory is not checked."""
    if choose_device(config.device).type != "cpu":
        return True
    planned = memory(from_settings({"batch_size": 1}, config))
    needed = sum(planned.values()) - planned["copies being saved"]
    return needed < (machine_memory() or math.inf)


@dataclass(frozen=True)
class Pace:
    """The seconds that were measured on this machine, and what else it did meanwhile."""

    step: float
    evaluated_token: float
    sampled_token: float
    others: float = 0.0  # cores that other processes kept busy; 0 where the system does not tell

    @property
    def is_disturbed(self) -> bool:
        """Whether other work took a large part of the processor."""
        return self.others > DISTURBING * (os.cpu_count() or 1)


def probe(config: TrainConfig, seconds: float = MEASURED_SECONDS) -> Pace:
    """Time real steps of `config` on random tokens for about `seconds`, then evaluation and sampling for a third of it.

    What teachers predict is the same at each place. torch.compile is not used, because it takes longer than the probe.
    """
    device = choose_device(config.device)
    block_size = config.model.block_size
    vocab_size = config.model.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab_size, max(100_000, 2 * block_size)).astype(np.uint32)
    val = tokens[: max(WINDOW_TOKENS, block_size) + 1]
    data = TokenData(Path(), tokens, val, vocab_size, True, "random", {})
    rest = seconds / 6  # for evaluation, and as long for sampling
    began, before = time.perf_counter(), seconds_of_others()
    with fixed_order(device):
        parts = build(config, data, None, device, choose_dtype(config.dtype, device))
        if config.teacher:
            parts.predictions = uniform(config)
        pace = Pace(
            _step_seconds(parts, seconds), _evaluated_token_seconds(parts, rest), _sampled_token_seconds(parts, rest)
        )
    return dataclasses.replace(pace, others=_cores_of_others(before, time.perf_counter() - began))


def _cores_of_others(before: float | None, seconds: float) -> float:
    """Return the cores that others kept busy in the last `seconds`, since `seconds_of_others` was `before`."""
    after = seconds_of_others()
    if before is None or after is None:
        return 0.0
    return max(0.0, (after - before) / seconds)


def _median_seconds(work: Callable[[int], object], seconds: float) -> float:
    """Call `work` with 1, 2, … for about `seconds` and at least once; return the median of its times."""
    times: list[float] = []
    while not times or (sum(times) < seconds and len(times) < 500):
        start = time.perf_counter()
        work(len(times) + 1)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _step_seconds(parts: Parts, budget: float) -> float:
    """Return the seconds of a step, measured for about `budget` seconds, or extrapolated from shorter steps."""
    config = parts.config
    parts.model.train()
    windows = 0
    seconds = 0.0
    while windows < config.batch_size and seconds < budget / 10:
        windows = min(max(1, 4 * windows), config.batch_size)
        short_step = _with_batch(parts, windows, micro_batches=1)
        seconds = min(_timed_step(short_step, number) for number in range(3))  # the first one includes set-up
    if windows == config.batch_size and seconds * config.gradient_accumulation_steps < budget / 2:
        train_step(parts, 0).loss.item()  # set-up
        return _median_seconds(lambda number: train_step(parts, number).loss.item(), budget)
    return _extrapolated_step_seconds(parts, windows, seconds, budget)


def _extrapolated_step_seconds(parts: Parts, windows: int, one: float, budget: float) -> float:
    """Extrapolate the seconds of a step from steps of one and of two micro-batches of `windows` windows.

    A step takes the time of the optimizer, and the time of a window for each window. Both come from the fastest of
    several measurements in turn: the extrapolation would multiply the delay of a step that other work held up. `one`:
    seconds of a step of one micro-batch, as measured before.
    """
    one_micro_batch = _with_batch(parts, windows, micro_batches=1)
    two_micro_batches = _with_batch(parts, windows, micro_batches=2)
    two = math.inf
    began = time.perf_counter()
    rounds = 0
    while rounds < 2 or time.perf_counter() - began < budget:
        one = min(one, _timed_step(one_micro_batch, rounds))
        two = min(two, _timed_step(two_micro_batches, rounds))
        rounds += 1
    if two <= one:  # other work ended in between: count the time of the optimizer with every window
        one = two / 2
    return one + (two - one) * (parts.config.windows_per_step / windows - 1)


def _with_batch(parts: Parts, batch_size: int, micro_batches: int) -> Parts:
    settings = {"batch_size": batch_size, "gradient_accumulation_steps": micro_batches}
    return dataclasses.replace(parts, config=from_settings(settings, parts.config))


def _timed_step(parts: Parts, number: int) -> float:
    start = time.perf_counter()
    train_step(parts, number).loss.item()
    return time.perf_counter() - start


def _evaluated_token_seconds(parts: Parts, budget: float) -> float:
    val = parts.data.val
    block_size = parts.config.model.block_size
    with precision(parts.dtype, parts.device):
        evaluate(parts.model, val, block_size, len(val))  # set-up
        seconds = _median_seconds(lambda _: evaluate(parts.model, val, block_size, len(val)), budget)
    return seconds / (len(val) - 1)


def _sampled_token_seconds(parts: Parts, budget: float) -> float:
    count = 30
    prompt = torch.zeros(1, 1, dtype=torch.int64, device=parts.device)
    with precision(parts.dtype, parts.device):
        return _median_seconds(lambda _: list(generate(parts.model, prompt, count)), budget) / count


def run_seconds(config: TrainConfig, text: Text, pace: Pace, teachers: Sequence[GPTConfig] = ()) -> dict[str, float]:
    """Return the seconds of a run by part, at a measured pace. `teachers`: the shapes of those that predict first."""
    evaluations = count_evaluations(config)
    steps = config.max_steps * pace.step
    save_every = config.save_every or config.eval_every
    saved_length = steps if isinstance(save_every, float) else config.max_steps  # in the unit of save_every
    saves = 2 + saved_length / save_every
    found = {
        "steps": steps,
        "evaluation": count_validations(config) * validated_tokens(config, text) * pace.evaluated_token,
        "samples": evaluations * config.sample_tokens * pace.sampled_token,
        "pictures": min(evaluations, 1 + steps / (PICTURE_PACE * PICTURE_SECONDS)) * PICTURE_SECONDS,
        "saving": saves * bytes_copied_to_save(config) / SAVING_RATE,
        "starting": starting_seconds(text),
    }
    if teachers:
        found["teachers"] = teaching_seconds(config, text, pace, teachers)
    return found


def teaching_seconds(config: TrainConfig, text: Text, pace: Pace, teachers: Sequence[GPTConfig]) -> float:
    """Return the seconds in which teachers predict the text, each token in two windows, by the pace of evaluations."""
    ratios = (flops_per_token(teacher) / flops_per_token(config.model) for teacher in teachers)
    return 2.0 * text.tokens * pace.evaluated_token * math.fsum(ratio**STEP_GROWTH for ratio in ratios)


def starting_seconds(text: Text) -> float:
    """Return the seconds before the first step: importing, preparing the text, set-up."""
    return STARTING_SECONDS + preparing_seconds(text)


def preparing_seconds(text: Text) -> float:
    """Return the seconds that preparing the text took or, estimated, will take."""
    return text.preparation + tokenizing_seconds(text.unprepared, text.trains_bpe)


def tokenizing_seconds(size: float, trains_bpe: bool) -> float:
    """Return the seconds from a text of `size` bytes to its token files."""
    trained = min(size, SAMPLE) if trains_bpe else 0.0
    return trained / BPE_TRAINING_RATE + size / TOKENIZING_RATE


def validated_tokens(config: TrainConfig, text: Text) -> float:
    """Return the tokens of the validation split that an evaluation uses."""
    return min(text.tokens * config.val_fraction / (1 - config.val_fraction), config.eval_tokens)
