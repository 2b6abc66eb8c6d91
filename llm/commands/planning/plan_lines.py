"""The plan of a run on this machine, in lines."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llm.config import TrainConfig
from llm.plan.arithmetic import MIB, TOKENS_PER_PARAMETER, optimal_parameters
from llm.plan.forecast import counted, in_millions, short, spoken

if TYPE_CHECKING:
    from llm.plan.text_size import Text


def plan_lines(config: TrainConfig, facts: dict[str, Any], text: "Text", budget_seconds: float | None) -> Iterator[str]:
    """Yield the plan in lines. `facts` are `plan.predict`'s, `budget_seconds` is --time's."""
    model = config.model
    yield _line(
        "run",
        f"n_layer {model.n_layer}, n_embd {model.n_embd}, n_head {model.n_head}, block_size {model.block_size}, "
        f"vocabulary {model.vocab_size:,}; {config.max_steps:,} steps of {counted(config.windows_per_step, 'window')}, "
        f"max_lr {config.max_lr:g}",
    )
    epochs = config.max_steps * config.tokens_per_step / text.tokens
    estimated = " (estimated)" if text.unprepared else ""
    yield _line("text", f"{text.tokens:,} training tokens{estimated}, read {short(epochs)} times")
    parameters = facts["parameters"]
    by_part = ", ".join(f"{name} {size:,}" for name, size in parameters.items())
    yield _line("parameters", f"{sum(parameters.values()):,}: {by_part}")
    yield from _size_lines(facts)
    yield _line(
        "work",
        f"{short(facts['step_flops'] / 1e9)} GFLOP a step, {facts['head_flops'] / facts['step_flops']:.0%} of it for "
        f"the vocabulary; {facts['run_flops']:.3g} FLOP in all",
    )
    yield from _time_lines(config, facts)
    if not config.init_from:  # else most of the tokens are those that the weights have learned from
        yield _chinchilla_line(config, facts, text, budget_seconds)


def _line(title: str, words: str) -> str:
    return f"{title:<11}{words}"


def _size_lines(facts: dict[str, Any]) -> Iterator[str]:
    memory = facts["memory"]
    total = sum(memory.values())
    available = ""
    if facts["machine_memory"] and "process" in memory:  # else the memory is a GPU's
        verdict = "more than" if total > facts["machine_memory"] else "of"
        available = f", {verdict} the {facts['machine_memory'] / MIB:,.0f} here,"
    yield _line("memory", f"{total / MIB:,.0f} MiB{available} at peak: {_in_mebibytes(memory)}")
    yield _line("disk", f"{sum(facts['disk'].values()) / MIB:,.0f} MiB: {_in_mebibytes(facts['disk'])}")


def _in_mebibytes(sizes: dict[str, int]) -> str:
    """Return the sizes by name, without those that round to 0."""
    rounded = {name: f"{size / MIB:,.1f}" for name, size in sizes.items()}
    return ", ".join(f"{name} {size}" for name, size in rounded.items() if size != "0.0")


def _time_lines(config: TrainConfig, facts: dict[str, Any]) -> Iterator[str]:
    if facts["seconds"] is None:
        yield _line("time", "not known: a step of one window does not fit in the memory here")
        return
    yield _line(
        "speed",
        f"{facts['step_seconds']:.3g} s a step, {facts['flops_per_second'] / 1e9:,.0f} GFLOP/s: measured just now",
    )
    total = sum(facts["seconds"].values())
    time = f"{spoken(total)}: " + ", ".join(f"{name} {spoken(value)}" for name, value in facts["seconds"].items())
    if config.max_time and config.max_time < total:
        time += f"; max_time ends it after {spoken(config.max_time)}"
    yield _line("time", time)


def _chinchilla_line(config: TrainConfig, facts: dict[str, Any], text: "Text", budget_seconds: float | None) -> str:
    """Return how the run compares with the compute-optimal one of Hoffmann et al. 2022."""
    ratio = config.max_steps * config.tokens_per_step / sum(facts["parameters"].values())
    words = (
        f"{short(ratio)} tokens per parameter, where {TOKENS_PER_PARAMETER} are compute-optimal (Hoffmann et al. "
        f"2022); read once, the text suits {in_millions(text.tokens / TOKENS_PER_PARAMETER)} parameters"
    )
    if facts["seconds"] is not None:
        seconds = budget_seconds or sum(facts["seconds"].values())
        best = optimal_parameters(seconds * facts["flops_per_second"])
        words += (
            f"; {spoken(seconds)} here suit {in_millions(best)} and {in_millions(TOKENS_PER_PARAMETER * best)} "
            "tokens of fresh text"
        )
    return _line("Chinchilla", words)
