"""`prove-resume`: compare a run that is killed at random moments and resumed with an uninterrupted one."""

from pathlib import Path
from typing import Any

from llm.commands.flags import Parser, add_settings, config_from, typed_settings, warn
from llm.config import FIELDS, PRESETS

DESCRIPTION = (
    "Train twice with the given settings: once uninterrupted, once killed by SIGKILL at random moments and resumed. "
    "All results of the two are compared bit for bit; exit code 1 if anything differs. "
    "Defaults: 60 steps, saving every 7, recording every 3, evaluating every 20, in the folder proof."
)

DEFAULTS = {"max_steps": 60, "save_every": 7, "log_every": 3, "eval_every": 20, "out_dir": "proof"}


def main(argv: list[str]) -> int:
    parser = Parser("losscurve prove-resume", DESCRIPTION, bare=("text",))
    parser.add_argument("--preset", metavar="NAME|FILE.toml", help=f"settings to start from: {', '.join(PRESETS)}")
    parser.add_argument("--kills", type=int, default=5, help="how often the second run is killed (default: 5)")
    add_settings(parser, FIELDS)
    args = parser.read(argv)
    for name, value in DEFAULTS.items():
        if not hasattr(args, name):
            setattr(args, name, value)
    config = config_from(args)

    import random

    from llm.checks.prove import fingerprint, killed_run, whole_run
    from llm.commands.bars import print_result

    flags = [f"--preset={args.preset}"] if args.preset else []
    flags += flags_of(typed_settings(args))
    whole_dir = Path(config.out_dir, "whole")
    killed_dir = Path(config.out_dir, "killed")
    print_result(f"training {config.max_steps} steps without interruption")
    whole_run(flags, whole_dir)
    generator = random.Random()  # without a seed: other moments each time
    kills = 0
    for step in killed_run(flags, killed_dir, config.max_steps, args.kills, generator):
        kills += 1
        print_result(f"killed after step {max(step, 0)}, resuming")
    if kills < args.kills:
        warn(f"the run ended after {kills} of {args.kills} kills; give more --max_steps for more")
    is_same = compare(fingerprint(whole_dir), fingerprint(killed_dir))
    print_result(f"{kills} kills: {'bit for bit the uninterrupted run' if is_same else 'NOT the same run'}")
    return 0 if is_same else 1


def flags_of(settings: dict[str, Any]) -> list[str]:
    """Return the settings as flags, without out_dir."""
    flags = []
    for name, value in settings.items():
        if name == "out_dir":
            continue
        words = value if isinstance(value, list) else [value]
        flags += [f"--{name}={word}" for word in words]
    return flags


def compare(whole: dict[str, str], killed: dict[str, str]) -> bool:
    """Print one line for each part of the two runs, and return whether all parts are equal."""
    from llm.commands.bars import print_result

    is_same = True
    for part in sorted(whole.keys() | killed.keys()):
        is_equal = whole.get(part) == killed.get(part)
        is_same = is_same and is_equal
        print_result(f"{'same' if is_equal else 'DIFFERS':<8} {part}  {(killed.get(part) or 'missing')[:16]}")
    return is_same
