"""`plan`: what a run will take, before anything is trained; or what to run in a given time."""

from typing import TYPE_CHECKING, Any

from llm.commands.flags import Parser, add_settings, config_from
from llm.config import FIELDS, PRESETS, TrainConfig, coerce
from llm.errors import UserError

if TYPE_CHECKING:
    from llm.plan import Pace

DESCRIPTION = "Say what a run will take here: memory, disk, time; or, with --time, what to run in that time."


def main(argv: list[str]) -> int:
    parser = Parser("losscurve plan", DESCRIPTION)
    parser.add_argument("--preset", metavar="NAME|FILE.toml", help=f"settings to start from: {', '.join(PRESETS)}")
    add_settings(parser, FIELDS)
    parser.add_argument("--time", metavar="TIME", help="propose a run that fits this long (90, 10m, 2h)")
    parser.add_argument("--out", metavar="FILE.toml", help="write the settings there, for train --preset")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    args = parser.read(argv)
    config = config_from(args)
    budget = None if args.time is None else duration(args.time)
    if args.out and not args.out.endswith(".toml"):
        raise UserError(f"out = {args.out}: give it the ending .toml, which --preset asks for")

    import json
    from pathlib import Path

    from llm.commands.bars import tell
    from llm.plan import probe, propose, text_tokens, with_vocabulary, write

    tokens, vocabulary, known = text_tokens(config)
    config = with_vocabulary(config, vocabulary)
    if budget is None:
        pace = probe(config)
    else:
        config, pace = propose(config, tokens, budget)
    facts = planned(config, tokens, pace)
    if args.json:
        tell(json.dumps(facts))
    else:
        tell("\n".join(lines(config, facts, known, budget)))
    if args.out:
        write(config, Path(args.out))
        if not args.json:
            tell(f"wrote {args.out}; train it with: losscurve train --preset {args.out}")
    return 0


def duration(text: str) -> float:
    """Seconds of --time. Raises UserError."""
    try:
        seconds = coerce("max_time", text)
    except UserError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise UserError(f"time = {text!r}: expected a duration such as 90, 10m or 2h")
    return float(seconds)


def planned(config: TrainConfig, tokens: int | None, pace: "Pace") -> dict[str, Any]:
    """All of a plan in numbers: parameters, bytes, FLOPs and seconds, each by part."""
    from llm import plan
    from llm.device import choose_device, choose_dtype

    dtype = choose_dtype(config.dtype, choose_device(config.device))
    step = plan.flops_per_token(config.model) * config.tokens_per_step
    return {
        "parameters": plan.parameters(config.model),
        "memory": plan.memory(config, dtype),
        "disk": plan.disk(config, tokens or 0),
        "step_flops": step,
        "run_flops": plan.run_flops(config),
        "flops_per_second": step / pace.step,
        "step_seconds": pace.step,
        "seconds": plan.run_seconds(config, tokens, pace),
        "text_tokens": tokens,
    }


def lines(config: TrainConfig, facts: dict[str, Any], known: bool, budget: float | None) -> list[str]:
    """The plan in words."""
    from llm.plan import TOKENS_PER_PARAMETER, optimal_for_flops, optimal_for_tokens

    def parts(title: str, unit: str, scale: float, values: dict[str, float]) -> str:
        named = ", ".join(f"{name} {value / scale:,.1f}" for name, value in values.items() if value)
        return f"{title:<11}{sum(values.values()) / scale:,.1f} {unit}: {named}"

    tokens, count = facts["text_tokens"], sum(facts["parameters"].values())
    trained = config.max_steps * config.tokens_per_step
    shape = f"n_layer {config.model.n_layer}, n_embd {config.model.n_embd}, n_head {config.model.n_head}"
    found = [
        f"{'run':<11}{shape}, block_size {config.model.block_size}, vocabulary {config.model.vocab_size:,}; "
        f"{config.max_steps:,} steps of {config.windows_per_step} windows, max_lr {config.max_lr:g}",
        parts("parameters", "M", 1e6, facts["parameters"]),
        parts("memory", "MiB", 2**20, facts["memory"]),
        parts("disk", "MiB", 2**20, facts["disk"]),
        f"{'work':<11}{facts['step_flops'] / 1e9:,.1f} GFLOP a step, {facts['run_flops']:.3g} FLOP in all; "
        f"{facts['flops_per_second'] / 1e9:,.0f} GFLOP/s and {facts['step_seconds']:.3g} s a step measured here",
        parts("time", "s", 1, facts["seconds"]),
    ]
    if tokens is None:
        found.append(f"{'text':<11}its size is not known before it is read, so neither are the epochs")
    else:
        how = "prepared" if known else "estimated from the size of the text, which is not prepared"
        found.append(f"{'text':<11}{tokens:,} training tokens ({how}), read {trained / tokens:.1f} times")
        best = optimal_for_tokens(tokens).parameters / 1e6
        found.append(f"{'':<11}read once, it suits a model of {best:.3g} M parameters")
    seconds = budget or sum(facts["seconds"].values())
    best_here = optimal_for_flops(seconds * facts["flops_per_second"])
    found.append(
        f"{'Chinchilla':<11}{trained / count:.2g} tokens per parameter, {TOKENS_PER_PARAMETER} are compute-optimal; "
        f"{seconds:,.0f} s here suit {best_here.parameters / 1e6:.3g} M parameters and {best_here.tokens / 1e6:.3g} M "
        "tokens of fresh text (Hoffmann et al. 2022)"
    )
    return found
