"""The forecast of a running run: how long it will take, and at its end how far off the forecast was."""

import math

from llm.config import TrainConfig
from llm.config.counts import count_parameters
from llm.plan.arithmetic import MIB, TOKENS_PER_PARAMETER, count_evaluations, disk, memory, peak_memory, run_flops


def short(number: float) -> str:
    """Return three digits of a number: '0.0502', '13.2', '294,000', and from a million on '1.23e+06'."""
    return f"{float(f'{number:.3g}'):,g}"


def in_millions(number: float) -> str:
    """Return '39.2 M' or, of less than a tenth of a million, '90' or '15,100'."""
    return f"{short(number / 1e6)} M" if number >= 1e5 else short(number)


def counted(count: int, noun: str) -> str:
    """Return "1 window" or "2 windows"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def spoken(seconds: float) -> str:
    """Return a duration as '48 s', '16.5 min', '3.4 h' or '12.1 days'."""
    for unit, size, limit in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < limit * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:,.1f} days"


def outline(config: TrainConfig, tokens: int, kept_bytes: int = 0) -> str:
    """Return lines for the start of a run: its memory, disk, FLOPs and tokens per parameter. Nothing is measured.

    A run from other weights has no tokens per parameter: those that the weights have learned from are not known.
    `tokens`: tokens of the training split. `kept_bytes`: of memory that was used before.
    """
    memory_mib = (sum(memory(config).values()) + kept_bytes) / MIB
    disk_mib = sum(disk(config, tokens).values()) / MIB
    flops = run_flops(config)
    needs = f"about {memory_mib:,.0f} MiB of memory and {disk_mib:,.0f} MiB of disk; {flops:.2g} FLOPs"
    if config.init_from:
        return needs
    tokens_per_parameter = config.max_steps * config.tokens_per_step / count_parameters(config.model)
    return (
        f"{needs}\n"
        f"{short(tokens_per_parameter)} tokens per parameter (Chinchilla: {TOKENS_PER_PARAMETER}); "
        f"read once, the text suits {in_millions(tokens / TOKENS_PER_PARAMETER)} parameters"
    )


class Forecast:
    """A run's forecast of its own time, made once the pace is known, and compared at the end.

    The peak memory of the plan is compared at the end too.
    """

    # the pace counts as known after this many steps and seconds
    STEPS = 20
    SECONDS = 5.0

    def __init__(self, config: TrainConfig, kept_bytes: int = 0) -> None:
        self.config = config
        self.kept_bytes = kept_bytes  # of memory that was used before
        self.first: tuple[int, float] | None = None  # the first step seen, and the seconds of steps until its end
        self.predicted: float | None = None  # seconds of the whole run
        self.peak_before = peak_memory() or 0  # of preparing the text, for one, which the plan does not count

    def at(self, step: int, seconds: float, bookkeeping: float) -> str | None:
        """Return a line about the whole run as soon as the pace is known, and None before and after.

        Call it after each step.

        Args:
            step: completed steps
            seconds: since the run began
            bookkeeping: those of `seconds` that were spent on anything but steps
        """
        config = self.config
        step_seconds = seconds - bookkeeping
        if self.first is None:  # the first step includes set-up, so the pace is measured from its end
            self.first = step, step_seconds
        first_step, first_seconds = self.first
        steps = step - first_step
        took = step_seconds - first_seconds
        if self.predicted is not None or steps < self.STEPS or took < self.SECONDS:
            return None
        evaluated = 1 + (step - 1) // config.eval_every
        remaining_bookkeeping = (count_evaluations(config) - evaluated) * bookkeeping / evaluated
        whole = seconds + (config.max_steps - step) * took / steps + remaining_bookkeeping
        self.predicted = min(whole, config.max_time or math.inf)
        return f"at {took / steps:.2g} s a step, this run will take about {spoken(self.predicted)}"

    def ended(self, seconds: float) -> str | None:
        """Return how far off the forecast of a finished run was; None if the run was too short for a forecast.

        `seconds`: since the run began.
        """
        if self.predicted is None:
            return None
        line = f"predicted {spoken(self.predicted)}, took {spoken(seconds)}: {_error(self.predicted, seconds)}"
        planned = memory(self.config)
        peak = peak_memory() if "process" in planned else None  # on a GPU, the plan is of the GPU's memory
        if peak:
            total = sum(planned.values()) + self.kept_bytes
            line += f"; {total / MIB:,.0f} MiB, "
            if peak > self.peak_before:
                line += f"took {peak / MIB:,.0f} MiB: {_error(total, peak)}"
            else:
                line += f"took less than the {peak / MIB:,.0f} MiB before the first step"
        return line


def _error(predicted: float, truth: float) -> str:
    error = predicted / truth - 1
    if abs(error) < 0.005:
        return "right"
    direction = "high" if error > 0 else "low"
    return f"{abs(error):.0%} too {direction}"
