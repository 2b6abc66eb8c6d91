"""A plan for many accelerators as lines, tables and JSON."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llm.commands.planning.plan_scale_prediction import ScalePlan, Tables
from llm.commands.planning.tables import format_table
from llm.config.counts import count_parameters, count_parameters_by_part
from llm.plan import accelerators, clusters
from llm.plan.arithmetic import TOKENS_PER_PARAMETER, checkpoint_bytes, optimal_parameters, run_flops
from llm.plan.forecast import short, spoken

if TYPE_CHECKING:
    from llm.config import TrainConfig
    from llm.plan.clusters import Prediction


GIB = 2**30


WITH_PARTS = ("ddp", "fsdp")  # the ways to share the model whose memory is printed by part


TITLES = ("N", "windows", "tokens/s", "efficiency", "waiting", "GiB a rank", "time")


def as_json(plan: ScalePlan, tables: Tables) -> dict[str, Any]:
    """Return the content of --json: bytes, seconds, tokens per second. Unknown values are None."""

    def with_rate(row: "Prediction") -> dict[str, Any]:
        return asdict(row) | {"tokens_per_second": row.tokens_per_second}

    seconds = plan.seconds(plan.prediction)
    accelerator = asdict(plan.accelerator)
    for key in ("memory", "memory_bandwidth", "peak"):
        accelerator[key] = accelerator[key] or None
    cost = None
    if plan.price:
        cost = clusters.cost(sum(seconds.values()), plan.prediction.ranks, plan.price)
    return {
        "parameters": count_parameters_by_part(plan.config.model),
        "accelerator": accelerator,
        "rate_of_one": plan.rate,
        "memory": plan.memory,
        "parallel": plan.parallel,
        "step": with_rate(plan.prediction),
        "seconds": seconds,
        "cost": cost,
        "tables": {scaling: [with_rate(row) for row in rows] for scaling, rows in tables.items()},
    }


def plan_lines(plan: ScalePlan, flops_budget: float | None) -> Iterator[str]:
    """Yield the plan in lines, the assumptions last."""
    yield from _run_lines(plan)
    yield from _memory_lines(plan)
    yield from _time_lines(plan)
    if flops_budget:
        yield _budget_line(plan, flops_budget)
    for sentence in clusters.assumptions(plan.accelerator, plan.parallel):
        yield _line("assumed", sentence)


def _line(title: str, words: str) -> str:
    return f"{title:<12}{words}"


def _run_lines(plan: ScalePlan) -> Iterator[str]:
    config = plan.config
    model = config.model
    yield _line(
        "run",
        f"{_parameter_count(plan):,} parameters: n_layer {model.n_layer}, n_embd {model.n_embd}, "
        f"block_size {model.block_size}, vocabulary {model.vocab_size:,}; {config.max_steps:,} steps of "
        f"{config.windows_per_step} windows, {run_flops(config):.3g} FLOP",
    )
    yield _line(
        "accelerator",
        f"{plan.prediction.ranks:,} x {plan.accelerator.name}, {_memory_in_gb(plan)}; "
        f"{three_digits(plan.rate)} tokens/s of one: {plan.rate_source}",
    )


def _memory_lines(plan: ScalePlan) -> Iterator[str]:
    for way, memory in plan.memory.items():
        fits = clusters.fits(memory, plan.accelerator)
        if fits is None:
            verdict = "room not known"
        elif fits:
            verdict = "fits"
        else:
            verdict = f"more than fits {_memory_in_gb(plan)}"
        parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in memory.items() if size >= 0.005 * GIB)
        detail = f": {parts}" if way in WITH_PARTS else ""
        yield _line("memory", f"{way}: {sum(memory.values()) / GIB:.2f} GiB a rank, {verdict}{detail}")
    # rank 0 gathers the weights and the optimizer's state to save them
    yield _line("saving", f"{checkpoint_bytes(plan.config) / GIB:.2f} GiB more in the first rank's host")


def _time_lines(plan: ScalePlan) -> Iterator[str]:
    step = plan.prediction
    yield _line(
        "speed",
        f"{plan.parallel}: {three_digits(step.tokens_per_second)} tokens/s, {step.step:.3g} s a step: computing "
        f"{step.computing:.3g}, update {step.update:.3g}, waiting for messages {step.waiting:.3g} (they take "
        f"{step.messages:.3g}); efficiency {step.efficiency:.1%}",
    )
    seconds = plan.seconds(step)
    total = sum(seconds.values())
    parts = ", ".join(f"{name} {spoken(value)}" for name, value in seconds.items())
    yield _line("time", f"{spoken(total)}: {parts}; without samples, saving, starting")
    if plan.price:
        cost = clusters.cost(total, step.ranks, plan.price)
        hours = f"{short(total / 3600 * step.ranks)} accelerator-hours at {plan.price:g}"
        yield _line("cost", f"{cost:,.2f}: {hours}")


def _budget_line(plan: ScalePlan, flops_budget: float) -> str:
    best = optimal_parameters(flops_budget)
    flops_per_second = run_flops(plan.config) / plan.config.max_steps / plan.prediction.step
    return _line(
        "budget",
        f"{flops_budget:.3g} FLOP suit {short(best / 1e6)} M parameters and "
        f"{short(TOKENS_PER_PARAMETER * best / 1e6)} M tokens (Hoffmann et al. 2022: C = 6 N D, D = "
        f"{TOKENS_PER_PARAMETER} N); {spoken(flops_budget / flops_per_second)} at this run's FLOP/s",
    )


def _parameter_count(plan: ScalePlan) -> int:
    return count_parameters(plan.config.model)


def _memory_in_gb(plan: ScalePlan) -> str:
    return f"{plan.accelerator.memory / accelerators.GB:.3g} GB"


def three_digits(number: float) -> str:
    """Return the number rounded to three digits and written in full: '13,500,000'."""
    return f"{float(f'{number:.3g}'):,.0f}"


def table_lines(plan: ScalePlan, scaling: str, rows: list["Prediction"]) -> Iterator[str]:
    """Yield the table of "strong" or "weak" scaling with its title, and the process counts that are not possible."""
    config = plan.config
    sizes = {
        "strong": f"the run's {config.windows_per_step} windows a step, shared",
        "weak": f"{config.batch_size} windows for each accelerator; a step of many more windows learns less a token",
    }
    yield f"\n{scaling} scaling, {plan.parallel}: {sizes[scaling]}"
    titles = [*TITLES, "cost"] if plan.price else TITLES
    cells = [_row(plan, scaling, row) for row in rows]
    yield format_table(titles, cells)
    if any("!" in cell for row in cells for cell in row):
        yield f"!: more than fits {_memory_in_gb(plan)}"
    predicted = {row.ranks for row in rows}
    left = [count for count in clusters.COUNTS if count not in predicted]
    if left:
        counts = ", ".join(f"{count:,}" for count in left)
        run = _config_for(config, scaling, left[0])
        yield f"not {counts}: {clusters.refusal(run, left[0], plan.accelerator)}"


def _row(plan: ScalePlan, scaling: str, row: "Prediction") -> list[str]:
    run = _config_for(plan.config, scaling, row.ranks)
    memory = clusters.rank_memory(
        run, row.ranks, plan.parallel, plan.accelerator.is_cpu, plan.number_size, teachers=plan.teachers
    )
    mark = "!" if clusters.fits(memory, plan.accelerator) is False else ""
    seconds = sum(plan.seconds(row).values())
    cells = [
        f"{row.ranks:,}",
        f"{run.windows_per_step:,}",
        three_digits(row.tokens_per_second),
        f"{row.efficiency:.1%}",
        f"{row.waiting / row.step:.1%}",
        f"{mark}{sum(memory.values()) / GIB:.2f}",
        spoken(seconds),
    ]
    if plan.price:
        cells.append(f"{clusters.cost(seconds, row.ranks, plan.price):,.2f}")
    return cells


def _config_for(config: "TrainConfig", scaling: str, ranks: int) -> "TrainConfig":
    """Return the run on `ranks` accelerators: by weak scaling its step grows with them."""
    return clusters.weak(config, ranks) if scaling == "weak" else config
