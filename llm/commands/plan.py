"""`plan`: what a run will take, before anything is trained; or what to run in a given time.

What it will take on many accelerators: `plan_scale.py`.
"""

import os
from typing import TYPE_CHECKING, Any

from llm.commands import plan_scale
from llm.commands.flags import Parser, add_settings, config_from, flag, path, typed_settings, warn
from llm.config import FIELDS, PRESETS, TrainConfig, parse_duration
from llm.errors import UserError

if TYPE_CHECKING:
    from llm.plan.text_size import Text
    from llm.plan.timing import Pace

DESCRIPTION = "Say what a run will take here: memory, disk, time; or, with --time, what to run in that time."
PROPOSED = (
    *("n_layer", "n_embd", "n_head", "batch_size", "gradient_accumulation_steps", "max_steps"),
    *("eval_every", "eval_tokens", "warmup_steps", "max_lr", "min_lr", "patience"),
)  # what --time decides


def main(argv: list[str]) -> int:
    parser = Parser("losscurve plan", DESCRIPTION, bare=("text",))
    parser.add_argument("--preset", metavar="NAME|FILE.toml", help=f"settings to start from: {', '.join(PRESETS)}")
    add_settings(parser, FIELDS)
    parser.add_argument("--time", metavar="TIME", help="propose a run that fits this long (90, 10m, 2h)")
    parser.add_argument("--out", metavar="FILE.toml", type=path, help="write the settings there, for train --preset")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan_scale.add_flags(parser)
    args = parser.read(argv)
    if plan_scale.asked(args):
        return plan_scale.main(args)
    config, budget = config_from(args), None if args.time is None else duration(args.time)
    typed = [name for name in PROPOSED if name in typed_settings(args)] + ["init_from"] * bool(config.init_from)
    if budget and typed:
        raise UserError(f"{typed[0]}: --time decides that; leave one of the two out")

    import json

    from llm.commands.bars import tell
    from llm.plan.proposal import check_new, propose, write
    from llm.plan.text_size import text_of, with_vocabulary
    from llm.plan.timing import fits, probe
    from llm.start.init_from import starting_point

    if args.out:
        check_new(args.out)
    if config.init_from:
        config = starting_point(config, warn)[0]
    text = text_of(config)
    if not config.init_from:
        config = with_vocabulary(config, text.vocabulary)
    pace, load = None, os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5 * (os.cpu_count() or 1):
        warn(f"other work was running here in the last minute (load {load:.1f}); times are told as if it went on")
    if budget:
        config, pace = propose(config, text, budget)
    elif fits(config):
        pace = probe(config)
    facts = planned(config, text, pace)
    tell(json.dumps(facts) if args.json else "\n".join(lines(config, facts, text, budget)))
    if args.out:
        write(config, args.out)
        if not args.json:
            tell(f"wrote {args.out}; train it with: losscurve train {flag('preset', args.out)}")
    return 0


def duration(text: str) -> float:
    """Seconds of --time. Raises UserError."""
    try:
        seconds = parse_duration(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise UserError(f"time = {text!r}: expected a duration such as 90, 10m or 2h")
    return seconds


def planned(config: TrainConfig, text: "Text", pace: "Pace | None") -> dict[str, Any]:
    """All of a plan in numbers: parameters, bytes, FLOPs and seconds, each by part. What is not known is None."""
    from llm.plan import arithmetic, timing

    step = arithmetic.flops_per_token(config.model) * config.tokens_per_step
    return {
        "parameters": arithmetic.parameters(config.model),
        "memory": arithmetic.memory(config),
        "machine_memory": arithmetic.machine_memory(),
        "disk": arithmetic.disk(config, text.tokens),
        "step_flops": step,
        "run_flops": arithmetic.run_flops(config),
        "flops_per_second": step / pace.step if pace else None,
        "step_seconds": pace.step if pace else None,
        "seconds": timing.run_seconds(config, text, pace) if pace else None,
        "text_tokens": text.tokens,
    }


def lines(config: TrainConfig, facts: dict[str, Any], text: "Text", budget: float | None) -> list[str]:
    """The plan in words."""
    from llm.plan.arithmetic import TOKENS_PER_PARAMETER, optimal_parameters
    from llm.plan.forecast import short, spoken
    from llm.plan.proposal import EPOCHS, SHARE

    def mebibytes(values: dict[str, int]) -> str:
        shown = {name: f"{value / 2**20:,.1f}" for name, value in values.items()}
        return ", ".join(f"{name} {value}" for name, value in shown.items() if value != "0.0")

    model, count = config.model, sum(facts["parameters"].values())
    trained, space = config.max_steps * config.tokens_per_step, sum(facts["memory"].values())
    has = facts["machine_memory"] if "process" in facts["memory"] else None  # else it is a card's
    head = 6 * model.vocab_size * model.n_embd * config.tokens_per_step / facts["step_flops"]
    here = f", {'more than' if space > has else 'of'} the {has / 2**20:,.0f} here," if has else ""
    found = {
        "run": f"n_layer {model.n_layer}, n_embd {model.n_embd}, n_head {model.n_head}, block_size {model.block_size}, "
        f"vocabulary {model.vocab_size:,}; {config.max_steps:,} steps of {config.windows_per_step} windows, "
        f"max_lr {config.max_lr:g}",
        "text": f"{text.tokens:,} training tokens{' (estimated)' if text.unprepared else ''}, "
        f"read {short(trained / text.tokens)} times",
        "parameters": f"{count:,}: " + ", ".join(f"{name} {size:,}" for name, size in facts["parameters"].items()),
        "memory": f"{space / 2**20:,.0f} MiB{here} at peak: {mebibytes(facts['memory'])}",
        "disk": f"{sum(facts['disk'].values()) / 2**20:,.0f} MiB: {mebibytes(facts['disk'])}",
        "work": f"{short(facts['step_flops'] / 1e9)} GFLOP a step, {head:.0%} of it for the vocabulary; "
        f"{facts['run_flops']:.3g} FLOP in all",
    }
    suits = short(text.tokens / TOKENS_PER_PARAMETER / 1e6)
    chinchilla = (
        f"{short(trained / count)} tokens per parameter, where {TOKENS_PER_PARAMETER} are compute-optimal "
        f"(Hoffmann et al. 2022); read once, the text suits {suits} M parameters"
    )
    if facts["seconds"] is None:
        found["time"] = "not known: a step of one window does not fit in the memory here"
    else:
        seconds = sum(facts["seconds"].values())
        found["speed"] = (
            f"{facts['step_seconds']:.3g} s a step, {facts['flops_per_second'] / 1e9:,.0f} GFLOP/s: measured just now"
        )
        spent = ", ".join(f"{name} {spoken(value)}" for name, value in facts["seconds"].items())
        found["time"] = f"{spoken(seconds)}: {spent}"
        if config.max_time and config.max_time < seconds:
            found["time"] += f"; max_time ends it after {spoken(config.max_time)}"
        if budget and seconds < SHARE * budget / 1.1:
            found["time"] += f"; a text read more than {EPOCHS} times gives little more"
        best = optimal_parameters((budget or seconds) * facts["flops_per_second"])
        chinchilla += (
            f"; {spoken(budget or seconds)} here suit {short(best / 1e6)} M and "
            f"{short(TOKENS_PER_PARAMETER * best / 1e6)} M tokens of fresh text"
        )
    return [f"{title:<11}{words}" for title, words in (found | {"Chinchilla": chinchilla}).items()]
