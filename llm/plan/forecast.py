"""A run's own prediction: how long it will take, and at the end how far off that was."""

import math

from llm.config import TrainConfig
from llm.plan.arithmetic import MIB, TOKENS_PER_PARAMETER, disk, evaluations, memory, parameters, peak_memory, run_flops


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
