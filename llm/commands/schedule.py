"""`schedule`: print and draw the learning rate of a run, from the flags of `train`, before training."""

import shlex
from pathlib import Path

from llm.commands.flags import Parser, add_settings, config_from, path, warn
from llm.config import FIELDS, TrainConfig
from llm.errors import UserError
from llm.schedule import decay_start, lr_at, warmup_warning

# the settings that the schedule depends on
RELEVANT = ("max_steps", "warmup_steps", "max_lr", "min_lr", "schedule", "decay_fraction")


def main(argv: list[str]) -> int:
    parser = Parser(
        "losscurve schedule",
        "Show the learning rate of a run before training. Accepts every flag of train; only the first few matter.",
        bare=("text",),
    )
    parser.add_argument("--preset", metavar="NAME|FILE", help="a preset by name, or a TOML file")
    parser.add_argument(
        "--out", metavar="FILE", type=path, default=Path("schedule.png"), help="picture (default: schedule.png)"
    )
    add_settings(parser, [*RELEVANT, *(name for name in FIELDS if name not in RELEVANT)])
    args = parser.read(argv)
    config = config_from(args)
    for word in config.text:
        if Path(word, "config.toml").is_file():
            settings = shlex.quote(str(Path(word, "config.toml")))
            raise UserError(f"{word}: is a run; for its schedule: losscurve schedule --preset {settings}")
    from llm.record.plot import plot_schedule

    plot_schedule(config, args.out)
    print(table(config))
    warning = warmup_warning(config)
    if warning:
        warn(warning)
    print(f"wrote {args.out}")
    return 0


def table(config: TrainConfig) -> str:
    """Return the learning rate at the start, in the warm-up, and at 12 even steps to the end; then the totals."""
    warmup = config.warmup
    steps = config.max_steps
    in_warmup = {warmup * i // 4 for i in range(4)}
    after_warmup = {warmup + (steps - warmup) * i // 12 for i in range(13)} | {decay_start(config)}
    notes = {decay_start(config): "start of cool-down", 0: "start", warmup: "end of warm-up", steps: "end"}
    lines = [f"{'step':>13}  {'learning rate':>13}  {'of the peak':>11}"]
    for step in sorted(in_warmup | after_warmup):
        lr = lr_at(step, config)
        lines.append(f"{step:>13,}  {lr:>13.3e}  {lr / config.max_lr:>11.1%}  {notes.get(step, '')}".rstrip())
    lines.append(
        f"in all: {steps:,} steps, {warmup:,} of them warm-up ({100 * warmup / steps:.3g} %); "
        f"{config.tokens_per_step:,} tokens a step, {steps * config.tokens_per_step:,} tokens"
    )
    return "\n".join(lines)
