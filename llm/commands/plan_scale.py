"""The part of `plan` about many accelerators: what a run will take on N of them, and a table from 1 to 1,024."""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llm.commands.flags import config_from, typed_settings, warn
from llm.config import FIELDS, TrainConfig
from llm.errors import UserError

if TYPE_CHECKING:
    from llm.plan.accelerators import Accelerator
    from llm.plan.clusters import Parallel, Prediction, Speed

NAMES = ("a100-40", "a100", "h100", "h200", "b200", "l4", "l40s")  # llm.scale's, without importing it for --help
WAYS = ("ddp", "fsdp")
FLAGS = (  # one that asks for this part, or that only this part knows
    *("nproc", "accelerator", "scale", "flops_budget", "parallel", "nproc_per_node", "tokens_per_second_per_device"),
    *("mfu", "bandwidth", "network_bandwidth", "price"),
)
GIB = 2**30


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("many accelerators (docs/plan.md says how they are predicted)")

    def add(name: str, help: str, **more: Any) -> None:
        if name not in FIELDS:  # else `add_settings` has added it
            group.add_argument(f"--{name}", default=None, help=help, **more)

    count, number = positive(int, "a whole number"), positive(float, "a number")
    add("nproc", "plan for so many processes, an accelerator each", metavar="N", type=count)
    add("accelerator", "of which kind (default: machines like this one, measured)", metavar="|".join(NAMES))
    add("parallel", "how they share the model (default: ddp where it fits)", metavar="ddp|fsdp")
    add("scale", "a table over 1 to 1,024 of them; --out FILE.png draws it", action="store_true")
    add("nproc_per_node", "in one node (default: 8; of machines like this one: 1)", metavar="N", type=count)
    add("tokens_per_second_per_device", "as measured on one", metavar="RATE", type=number)
    add("mfu", "share of the vendor's peak, where no rate is given (default: 0.4)", metavar="SHARE", type=number)
    add("bandwidth", "GB/s that one sends to its neighbour in the node", metavar="GB/S", type=number)
    add("network_bandwidth", "GB/s that one sends to another node", metavar="GB/S", type=number)
    add("price", "of one for an hour; the run's cost is told", metavar="PRICE", type=number)
    add("flops_budget", "FLOPs: the size and tokens that suit them", metavar="FLOPS", type=number)


def positive(kind: Callable[[str], Any], words: str) -> Callable[[str], Any]:
    """A type for argparse: a number above 0 and finite."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
            if 0 < value < math.inf:
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"{text!r}: expected {words} above 0")

    return read


def asked(args: argparse.Namespace) -> bool:
    """Whether any flag of this part was typed."""
    return any(getattr(args, name, None) for name in FLAGS)


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """With None for every flag of this part that was not typed."""
    return argparse.Namespace(**dict.fromkeys(FLAGS) | vars(args))


def one_of(name: str, value: Any, known: Sequence[str]) -> None:
    """Raises UserError for a value that is none of those."""
    if value is not None and value not in known:
        raise UserError(f"{name} = {value!r}: expected one of {', '.join(known)}")


@dataclass(frozen=True)
class Plan:
    """What is planned and what was found; sizes in bytes, times in seconds."""

    config: TrainConfig
    text_tokens: int
    accelerator: "Accelerator"
    source: str  # of the rate of one
    rate: float  # tokens a second
    size: int  # of a number in the products
    speed: "Speed"
    parallel: "Parallel"
    memory: dict[str, dict[str, int]]  # of a rank, by way and part
    found: "Prediction"
    price: float | None

    def seconds(self, found: "Prediction") -> dict[str, float]:
        """Of the run's tokens, at the pace found for it or in one of the tables."""
        from llm.plan import clusters

        held_out = self.text_tokens * self.config.val_fraction / (1 - self.config.val_fraction)
        return clusters.run_time(self.config, found, self.speed, min(held_out, self.config.eval_tokens))


def main(typed: argparse.Namespace) -> int:
    args = complete(typed)
    one_of("accelerator", args.accelerator, NAMES)
    one_of("parallel", args.parallel, WAYS)
    if args.time:
        raise UserError("time: a run that fits a time is proposed for one machine; leave out --time, or the others")
    if args.out and not args.scale:
        raise UserError("out: settings are written for one machine; leave it out, or draw --scale into a FILE.png")
    if args.mfu and args.mfu > 1:
        raise UserError(f"mfu = {args.mfu:g}: a share of the peak, at most 1")
    if args.accelerator and "device" in typed_settings(typed):
        raise UserError("device: --accelerator says where; leave one of the two out")
    config = config_from(typed)

    import json

    from llm.commands.bars import tell
    from llm.plan import clusters

    plan = planned(args, config)
    tables = {}
    if args.scale:
        given = plan.parallel, plan.accelerator, plan.speed
        tables = {way: clusters.simulated(plan.config, *given, way == "weak", plan.size) for way in ("strong", "weak")}
    if args.json:
        tell(json.dumps(numbers(plan, tables)))
    else:
        tell(
            "\n".join([*lines(plan, args.flops_budget), *(line for way in tables for line in table(plan, way, tables))])
        )
    if args.out:
        from llm.record.plot import plot_scaling

        curves: dict[str, list[tuple[float, float]]] = {
            f"{way} scaling: {whole(rows[-1].tokens_per_second)} tokens/s": [
                (row.ranks, row.efficiency) for row in rows
            ]
            for way, rows in tables.items()
        }
        plot_scaling(curves, f"predicted: {plan.parallel} on {plan.accelerator.name}", args.out)
        if not args.json:
            tell(f"wrote {args.out}")
    return 0


def planned(args: argparse.Namespace, config: TrainConfig) -> Plan:
    """Raises UserError where the run cannot be split so, or something has to be given."""
    from llm.plan import accelerators, clusters
    from llm.plan.text_size import text_of, with_vocabulary
    from llm.start.init_from import starting_point

    if config.init_from:
        config = starting_point(config, warn)[0]
    text = text_of(config)
    if not config.init_from:
        config = with_vocabulary(config, text.vocabulary)
    if args.accelerator:
        accelerator, size = accelerators.ACCELERATORS[args.accelerator], 4 if config.dtype == "float32" else 2
    else:
        accelerator, size = here(config)
    accelerator = clusters.with_links(accelerator, args.bandwidth, args.network_bandwidth, args.nproc_per_node)
    ranks = args.nproc or 1
    clusters.check(config, ranks, accelerator)
    rate, source = rate_of_one(args, config, accelerator, size)
    speed = clusters.speed_of(config, rate, accelerator)

    def held(way: "Parallel", checkpointing: bool = False, offload: bool = False) -> dict[str, int]:
        return clusters.rank_memory(config, ranks, way, accelerator.is_cpu, size, checkpointing, offload)

    memory = {
        "ddp": held("ddp"),
        "fsdp": held("fsdp"),
        "fsdp, activation_checkpointing": held("fsdp", True),
        "fsdp, that and cpu_offload": held("fsdp", True, True),
    }
    too_large = not args.parallel and clusters.fits(memory["ddp"], accelerator) is False
    parallel: Parallel = "fsdp" if too_large else config.parallel
    found = clusters.predicted(config, ranks, parallel, accelerator, speed, size)
    facts = accelerator, source, rate, size, speed, parallel, memory, found, args.price
    return Plan(config, text.tokens, *facts)


def here(config: TrainConfig) -> tuple["Accelerator", int]:
    """Machines like this one, and the bytes of a number in the products. Raises UserError on a GPU."""
    from llm.machine.device import choose_device, choose_dtype
    from llm.plan import accelerators
    from llm.plan.arithmetic import machine_memory

    device = choose_device(config.device)
    if device.type != "cpu":
        raise UserError("accelerator: links and memory are known of those in the table only; give --accelerator")
    size = choose_dtype(config.dtype, device).itemsize
    return accelerators.this_machine(float(machine_memory() or 0), memory_rate()), size


def memory_rate() -> float:
    """Bytes a second that this machine reads and writes, by copying 256 MiB, the best of three."""
    import time

    import torch

    source, times = torch.ones(2**26), []
    target = torch.empty_like(source)
    for _ in range(4):  # the first touches the pages
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times[1:])


def rate_of_one(
    args: argparse.Namespace, config: TrainConfig, accelerator: "Accelerator", size: int
) -> tuple[float, str]:
    """Tokens a second of one accelerator, and where that is from: given, measured here, or a share of the peak."""
    from llm.plan import clusters
    from llm.plan.timing import fits, probe

    if args.tokens_per_second_per_device:
        return args.tokens_per_second_per_device, "given"
    if not args.accelerator and not fits(config):
        raise UserError(
            "accelerator: a step of one window does not fit in the memory here; give it, or a rate by "
            "--tokens_per_second_per_device"
        )
    if not args.accelerator:
        return config.tokens_per_step / probe(config).step, "measured just now, one process with all its threads"
    if size == 4:
        raise UserError("dtype = 'float32': the vendor's peak is bfloat16's; give --tokens_per_second_per_device")
    share = args.mfu or clusters.MFU
    peak = f"{share:.0%} of the vendor's {accelerator.peak / 1e12:g} TFLOP/s"
    return clusters.assumed_rate(config, accelerator, share), f"{peak}, {'given' if args.mfu else 'assumed'}"


def numbers(plan: Plan, tables: dict[str, list["Prediction"]]) -> dict[str, Any]:
    """All of it for --json: bytes, seconds, tokens a second. What is not known is None."""
    from llm.plan.arithmetic import parameters
    from llm.plan.clusters import cost

    def told(row: "Prediction") -> dict[str, Any]:
        return asdict(row) | {"tokens_per_second": row.tokens_per_second}

    seconds = plan.seconds(plan.found)
    accelerator = asdict(plan.accelerator)
    for key in ("memory", "memory_bandwidth", "peak"):
        accelerator[key] = accelerator[key] or None
    return {
        "parameters": parameters(plan.config.model),
        "accelerator": accelerator,
        "rate_of_one": plan.rate,
        "memory": plan.memory,
        "parallel": plan.parallel,
        "step": told(plan.found),
        "seconds": seconds,
        "cost": cost(sum(seconds.values()), plan.found.ranks, plan.price) if plan.price else None,
        "tables": {way: [told(row) for row in rows] for way, rows in tables.items()},
    }


def lines(plan: Plan, flops_budget: float | None) -> Iterator[str]:
    """The plan in words, assumptions last."""
    from llm.plan import accelerators, clusters
    from llm.plan.arithmetic import TOKENS_PER_PARAMETER, optimal_parameters, parameters, run_flops
    from llm.plan.forecast import short, spoken

    def line(title: str, words: str) -> str:
        return f"{title:<12}{words}"

    config, model, found, accelerator = plan.config, plan.config.model, plan.found, plan.accelerator
    room = f"{accelerator.memory / accelerators.GB:.3g} GB"
    count = sum(parameters(model).values())
    yield line(
        "run",
        f"{count:,} parameters: n_layer {model.n_layer}, n_embd {model.n_embd}, block_size {model.block_size}, "
        f"vocabulary {model.vocab_size:,}; {config.max_steps:,} steps of {config.windows_per_step} windows, "
        f"{run_flops(config):.3g} FLOP",
    )
    yield line(
        "accelerator",
        f"{found.ranks:,} x {accelerator.name}, {room}; {whole(plan.rate)} tokens/s of one: {plan.source}",
    )
    for way, held in plan.memory.items():
        parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in held.items() if size >= 0.005 * GIB)
        fit = {True: "fits", False: f"more than fits {room}", None: "room not known"}[clusters.fits(held, accelerator)]
        detail = f": {parts}" if way in WAYS else ""
        yield line("memory", f"{way}: {sum(held.values()) / GIB:.2f} GiB a rank, {fit}{detail}")
    yield line("saving", f"{12 * count / GIB:.2f} GiB more in the first rank's host")
    yield line(
        "speed",
        f"{plan.parallel}: {whole(found.tokens_per_second)} tokens/s, {found.step:.3g} s a step: computing "
        f"{found.computing:.3g}, update {found.update:.3g}, waiting for messages {found.waiting:.3g} (they take "
        f"{found.messages:.3g}); efficiency {found.efficiency:.1%}",
    )
    seconds = plan.seconds(found)
    total, spent = sum(seconds.values()), ", ".join(f"{name} {spoken(value)}" for name, value in seconds.items())
    yield line("time", f"{spoken(total)}: {spent}; without samples, saving, starting")
    if plan.price:
        hours = f"{short(total / 3600 * found.ranks)} accelerator-hours at {plan.price:g}"
        yield line("cost", f"{clusters.cost(total, found.ranks, plan.price):,.2f}: {hours}")
    if flops_budget:
        best = optimal_parameters(flops_budget)
        pace = run_flops(config) / config.max_steps / found.step
        yield line(
            "budget",
            f"{flops_budget:.3g} FLOP suit {short(best / 1e6)} M parameters and "
            f"{short(TOKENS_PER_PARAMETER * best / 1e6)} M tokens (Hoffmann et al. 2022: C = 6 N D, D = "
            f"{TOKENS_PER_PARAMETER} N); {spoken(flops_budget / pace)} at this run's FLOP/s",
        )
    for sentence in clusters.assumptions(accelerator, plan.parallel):
        yield line("assumed", sentence)


def whole(number: float) -> str:
    """Three digits of it, written out: '13,500,000'."""
    return f"{float(f'{number:.3g}'):,.0f}"


def table(plan: Plan, way: str, tables: dict[str, list["Prediction"]]) -> Iterator[str]:
    """One of the tables, "strong" or "weak", with its title and the counts that cannot be."""
    from llm.plan import accelerators, clusters
    from llm.plan.forecast import spoken

    rows, accelerator, config = tables[way], plan.accelerator, plan.config
    sizes = {
        "strong": f"the run's {config.windows_per_step} windows a step, shared",
        "weak": f"{config.batch_size} windows for each accelerator; a step of many more windows learns less a token",
    }
    yield f"\n{way} scaling, {plan.parallel}: {sizes[way]}"
    titles = f"{'N':>5}{'windows':>9}{'tokens/s':>14}{'efficiency':>12}{'waiting':>9}{'GiB a rank':>12}{'time':>11}"
    yield titles + (f"{'cost':>14}" if plan.price else "")
    crowded = False
    for row in rows:
        run = clusters.weak(config, row.ranks) if way == "weak" else config
        held = clusters.rank_memory(run, row.ranks, plan.parallel, accelerator.is_cpu, plan.size)
        over = "!" if clusters.fits(held, accelerator) is False else ""
        crowded |= bool(over)
        seconds = sum(plan.seconds(row).values())
        shown = f"{row.ranks:>5,}{run.windows_per_step:>9,}{whole(row.tokens_per_second):>14}{row.efficiency:>12.1%}"
        shown += (
            f"{row.waiting / row.step:>9.1%}{over + format(sum(held.values()) / GIB, '.2f'):>12}{spoken(seconds):>11}"
        )
        yield shown + (f"{clusters.cost(seconds, row.ranks, plan.price):>14,.2f}" if plan.price else "")
    if crowded:
        yield f"!: more than fits {accelerator.memory / accelerators.GB:.3g} GB"
    done = {row.ranks for row in rows}
    left = [count for count in clusters.COUNTS if count not in done]
    if left:
        run = clusters.weak(config, left[0]) if way == "weak" else config
        yield f"not {', '.join(f'{count:,}' for count in left)}: {clusters.refusal(run, left[0], accelerator)}"
