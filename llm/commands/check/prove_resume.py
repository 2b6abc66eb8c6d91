"""`prove-resume`: runs with your settings, killed at random moments and resumed, against one that was not."""

from llm.commands.flags import Parser, add_settings, config_from, typed_settings, warn
from llm.config import FIELDS, PRESETS

DESCRIPTION = (
    "Train twice with the settings given: once whole, once killed by SIGKILL at random moments and resumed. "
    "Everything the two came to is compared bit for bit; exit code 1 if anything differs. "
    "Where not given: 60 steps, saving every 7, recording every 3, evaluating every 20, in the folder proof."
)


SHORT = {"max_steps": 60, "save_every": 7, "log_every": 3, "eval_every": 20, "out_dir": "proof"}


def main(argv: list[str]) -> int:
    parser = Parser("losscurve prove-resume", DESCRIPTION, bare=("text",))
    parser.add_argument("--preset", metavar="NAME|FILE.toml", help=f"settings to start from: {', '.join(PRESETS)}")
    parser.add_argument("--kills", type=int, default=5, help="how often the second run is killed (default: 5)")
    add_settings(parser, FIELDS)
    args = parser.read(argv)
    for name, value in SHORT.items():
        if not hasattr(args, name):
            setattr(args, name, value)
    config = config_from(args)

    import random
    from pathlib import Path

    from llm.checks.prove import fingerprint, killed_run, whole_run
    from llm.commands.bars import print_result

    flags = [f"--preset={args.preset}"] if args.preset else []
    for name, value in typed_settings(args).items():
        words = value if isinstance(value, list) else [value]
        flags += [f"--{name}={word}" for word in words if name != "out_dir"]
    folders = [Path(config.out_dir, name) for name in ("whole", "killed")]
    print_result(f"training {config.max_steps} steps in one go")
    whole_run(flags, folders[0])
    luck = random.Random()  # moments, not secrets
    hit = 0
    for step in killed_run(flags, folders[1], config.max_steps, args.kills, luck):
        hit += 1
        print_result(f"killed after step {max(step, 0)}, resuming")
    if hit < args.kills:
        warn(f"the run was done after {hit} of {args.kills} kills; give more --max_steps for more")
    whole, killed = (fingerprint(folder) for folder in folders)
    same = True
    for what in sorted(whole.keys() | killed.keys()):
        equal = whole.get(what) == killed.get(what)
        same = same and equal
        print_result(f"{'same' if equal else 'DIFFERS':<8} {what}  {(killed.get(what) or 'missing')[:16]}")
    print_result(f"{hit} kills: {'bit for bit the run that was never stopped' if same else 'NOT the same run'}")
    return 0 if same else 1
