"""The part of `plan` for many accelerators: its flags and its output.

`plan_scale_prediction.py` makes the prediction, `plan_scale_lines.py` has the lines and tables.
"""

import argparse
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llm.commands.flags import config_from, given_settings, typed_settings
from llm.errors import UserError

if TYPE_CHECKING:
    from llm.commands.planning.plan_scale_prediction import ScalePlan, Tables


ACCELERATORS = ("a100-40", "a100", "h100", "h200", "b200", "l4", "l40s")  # of llm.plan.accelerators; --help is fast


FLAGS = (  # each of these, if typed, asks for a plan for many accelerators
    "nproc",
    "accelerator",
    "scale",
    "flops_budget",
    "parallel",
    "nproc_per_node",
    "tokens_per_second_per_device",
    "mfu",
    "bandwidth",
    "network_bandwidth",
    "price",
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "many accelerators (docs/plan.md explains the prediction)",
        "Without --parallel: ddp if the model fits, otherwise fsdp.",
    )

    def add(name: str, help: str, **more: Any) -> None:
        group.add_argument(f"--{name}", default=None, help=help, **more)

    count = positive_number(int, "a whole number")
    number = positive_number(float, "a number")
    add("nproc", "processes to plan for, one accelerator each", metavar="N", type=count)
    add("accelerator", "kind (default: machines like this one, measured)", metavar="|".join(ACCELERATORS))
    add("scale", "print tables from 1 to 1,024 accelerators; --out FILE.png draws them", action="store_true")
    add("nproc_per_node", "accelerators per node (default: 8; 1 for machines like this one)", metavar="N", type=count)
    add("tokens_per_second_per_device", "throughput measured on one accelerator", metavar="RATE", type=number)
    add("mfu", "share of the vendor's peak, assumed if unmeasured (default: 0.4)", metavar="SHARE", type=number)
    add("bandwidth", "GB/s that one accelerator sends to its neighbour in the node", metavar="GB/S", type=number)
    add("network_bandwidth", "GB/s that one accelerator sends to another node", metavar="GB/S", type=number)
    add("price", "price of one accelerator for an hour; prints the cost of the run", metavar="PRICE", type=number)
    add("flops_budget", "print the model size and tokens that suit this number of FLOPs", metavar="FLOPS", type=number)


def positive_number(kind: Callable[[str], Any], words: str) -> Callable[[str], Any]:
    """Return a type for argparse: a finite number above 0. `words` names it in errors."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
            if 0 < value < math.inf:
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"{text!r}: expected {words} above 0")

    return parse


def is_requested(args: argparse.Namespace) -> bool:
    """Return whether any flag of this part was typed."""
    return any(getattr(args, name, None) for name in FLAGS)


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """Return the flags with None for every flag of this part that was not typed."""
    return argparse.Namespace(**dict.fromkeys(FLAGS) | vars(args))


def main(typed: argparse.Namespace) -> int:
    args = with_defaults(typed)
    check_flags(args, typed)
    config = config_from(typed)

    import json

    from llm.commands.bars import print_result
    from llm.commands.planning.plan_scale_lines import as_json, plan_lines, table_lines
    from llm.commands.planning.plan_scale_prediction import make_plan, make_tables

    plan = make_plan(args, config, given_settings(typed))
    tables = make_tables(plan) if args.scale else {}
    if args.json:
        print_result(json.dumps(as_json(plan, tables)))
    else:
        lines = list(plan_lines(plan, args.flops_budget))
        for scaling, rows in tables.items():
            lines += table_lines(plan, scaling, rows)
        print_result("\n".join(lines))
    if args.out:
        draw(plan, tables, args.out)
        if not args.json:
            print_result(f"wrote {args.out}")
    return 0


def check_flags(args: argparse.Namespace, typed: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go together."""
    if args.accelerator is not None and args.accelerator not in ACCELERATORS:
        raise UserError(f"accelerator = {args.accelerator!r}: expected one of {', '.join(ACCELERATORS)}")
    if args.time:
        raise UserError(
            "time: --time proposes a run for one machine; leave out --time, or the flags of many accelerators"
        )
    if args.out and not args.scale:
        raise UserError(
            "out: only a plan for one machine writes its settings; leave out --out, or draw the tables with --scale "
            "--out FILE.png"
        )
    if args.mfu and args.mfu > 1:
        raise UserError(f"mfu = {args.mfu:g}: expected a share of the peak, at most 1")
    if args.accelerator and "device" in typed_settings(typed):
        raise UserError("device: --accelerator decides it; leave one of the two out")


def draw(plan: "ScalePlan", tables: "Tables", out: Any) -> None:
    """Draw the efficiency of both tables over the number of accelerators, to the file `out`."""
    from llm.commands.planning.plan_scale_lines import three_digits
    from llm.record.plot import plot_scaling

    curves: dict[str, list[tuple[float, float]]] = {}
    for scaling, rows in tables.items():
        label = f"{scaling} scaling: {three_digits(rows[-1].tokens_per_second)} tokens/s"
        curves[label] = [(row.ranks, row.efficiency) for row in rows]
    plot_scaling(curves, f"predicted: {plan.parallel} on {plan.accelerator.name}", out)
