"""`schedule`: the learning rate of a run as a table and a picture, from the flags of `train`, before training."""

from pathlib import Path

from llm.commands.flags import Parser, add_settings, config_from, path, warn
from llm.config import FIELDS, TrainConfig
from llm.schedule import lr_at, warmup_warning

DECISIVE = ("max_steps", "warmup_steps", "max_lr", "min_lr", "schedule")


def main(argv: list[str]) -> int:
    parser = Parser(
        "losscurve schedule",
        "Show the learning rate of a run before it is trained. Takes every flag of train; the first few decide.",
        bare=("text",),
    )
    parser.add_argument("--preset", metavar="NAME|FILE", help="a preset by name, or a TOML file")
    parser.add_argument(
        "--out", metavar="FILE", type=path, default=Path("schedule.png"), help="picture (default: schedule.png)"
    )
    add_settings(parser, [*DECISIVE, *(name for name in FIELDS if name not in DECISIVE)])
    args = parser.read(argv)
    config = config_from(args)
    from llm.record.plot import plot_schedule

    plot_schedule(config, args.out)
    print(table(config))
    if warning := warmup_warning(config):
        warn(warning)
    print(f"wrote {args.out}")
    return 0


def table(config: TrainConfig) -> str:
    """The schedule at its start, through the warm-up, and at 12 even steps to its end; then the totals."""
    warmup, steps = config.warmup, config.max_steps
    shown = {warmup * i // 4 for i in range(4)} | {warmup + (steps - warmup) * i // 12 for i in range(13)}
    lines = [f"{'step':>13}  {'learning rate':>13}  {'of the peak':>11}"]
    for step in sorted(shown):
        lr = lr_at(step, config)
        note = {0: "start", warmup: "end of warm-up", steps: "end"}.get(step, "")
        lines.append(f"{step:>13,}  {lr:>13.3e}  {lr / config.max_lr:>11.1%}  {note}".rstrip())
    lines.append(
        f"in all: {steps:,} steps, {warmup:,} of them warm-up ({100 * warmup / steps:.3g} %); "
        f"{config.tokens_per_step:,} tokens a step, {steps * config.tokens_per_step:,} tokens"
    )
    return "\n".join(lines)
