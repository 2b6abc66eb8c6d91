"""`try`: train several settings with several seeds each, stop what is clearly behind, and say which is best."""

import argparse
import contextlib
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.commands.flags import Parser, add_settings, typed_settings, warn
from llm.config import FIELDS, PRESETS, given_names, read_toml, resolve_settings, to_settings
from llm.errors import UserError

if TYPE_CHECKING:
    from llm.experiments.trials import Setting, Try

DESCRIPTION = "Train several settings with the same seeds, each run in a folder of its own below --out_dir, and say \
which is best and what is chance. The same command goes on after an interrupt. Successive halving: at a third and at \
two thirds of the steps, a setting stops if a paired test over 3 seeds or more calls it worse than the leader, and if \
it is in the worse half."
SEEDS = 3
TRIALS = 10


def main(argv: list[str]) -> int:
    args = parse(argv)

    from llm import storage
    from llm.run import interrupts

    folder = Path(args.out_dir)
    storage.check_writable(folder)
    with storage.locked(folder, "this try"), interrupts() as caught:
        is_whole = train_all(args, folder, lambda: bool(caught))
        finish(folder)
    if not is_whole:
        warn(f"{folder}: stopped before its end; the same command goes on")
        return 128 + caught[0] if caught else 1
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the parsed flags. Raises UserError."""
    parser = Parser("losscurve try", DESCRIPTION, bare=("text",))
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="NAME=VALUE,…",
        help="values of a setting; several: all combinations",
    )
    parser.add_argument(
        "--search",
        action="append",
        default=[],
        metavar="NAME=LOW..HIGH",
        help="a range that Optuna searches; logarithmic if its ends differ by a factor of 10 or more",
    )
    parser.add_argument("--trials", type=int, metavar="N", help=f"settings that --search tries (default: {TRIALS})")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"seeds of each setting (default: {SEEDS})")
    parser.add_argument("--time", metavar="TIME", help="the time for all runs together (20m), divided equally")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once, each a process (default: 1)")
    parser.add_argument(
        "--against", choices=("best", "first"), default="best", help="compare with the best, or the first setting"
    )
    parser.add_argument("--keep_all", action="store_true", help="stop no setting early")
    parser.add_argument("--preset", metavar="NAME|FILE.toml", help=f"settings to start from: {', '.join(PRESETS)}")
    add_settings(parser, FIELDS)
    args = parser.read(argv)
    if "out_dir" not in args:
        raise UserError("--out_dir DIR: is missing; give a folder for all runs of the try")
    for name in ("seeds", "jobs", "trials"):
        number = getattr(args, name)
        if number is not None and not 1 <= number <= 1000:
            raise UserError(f"{name} = {number}: expected 1 to 1000")
    if args.trials is not None and not args.search:
        raise UserError("--trials: is the number of settings of a --search; give one, or leave it out")
    if not args.vary and not args.search:
        raise UserError("nothing to compare; give --vary max_lr=1e-3,3e-3 or --search max_lr=1e-4..1e-2")
    return args


def train_all(args: argparse.Namespace, folder: Path, stop: Any) -> bool:
    """Train the runs that are not there yet; return whether nothing interrupted it. Raises UserError."""
    from llm.experiments.rounds import train_settings
    from llm.experiments.search import import_optuna, parse_ranges, search
    from llm.experiments.trials import combinations, parse_vary

    vary, ranges = parse_vary(args.vary), parse_ranges(args.search)
    if both := vary.keys() & ranges.keys():
        raise UserError(f"{min(both)}: is both in --vary and in --search; give it once")
    if ranges:
        import_optuna()  # before anything is measured
    count = args.trials or TRIALS
    tried = open_try(args, folder, [] if ranges else combinations(vary), count if ranges else 0)
    given = frozenset(FIELDS if args.time else given_names(tried.preset, tried.given) | vary.keys() | ranges.keys())

    def train(settings: "list[Setting]") -> bool:
        return train_settings(tried, settings, given, args.jobs, stop, print_line, checks=not args.keep_all)

    if ranges:
        return search(tried, ranges, vary, count, lambda setting: train([setting]))
    return train(tried.settings)


def print_line(line: str) -> None:
    """Print the progress of the try on stderr."""
    import sys

    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def open_try(args: argparse.Namespace, folder: Path, settings: "list[Setting]", trials: int) -> "Try":
    """Return the try in `folder`, else a new one, with the settings and seeds asked for. Raises UserError."""
    from llm.experiments.trials import NAME, Try, check_same, read_try

    preset = read_toml(args.preset) if args.preset else {}
    given = {name: value for name, value in typed_settings(args).items() if name not in ("out_dir", "seed")}
    given = resolve_settings(given)
    first = int((preset | resolve_settings(typed_settings(args))).get("seed", FIELDS["seed"].default))
    known = read_try(folder) if (folder / NAME).exists() else None
    known = known if known and known.has_begun() else None
    seeds = [first + i for i in range(args.seeds or (len(known.seeds) if known else SEEDS))]
    asked: dict[str, Any] = {"preset": preset, "given": given, "first seed": first, "search": sorted(args.search)}
    if args.time or (args.search and args.vary):  # other choices of a search, or another part of the time for each run
        asked["vary"] = sorted(args.vary)
    if args.time:
        asked |= {"time": args.time, "seeds": len(seeds), "trials": trials, "jobs": args.jobs}
    if known:
        tried = known
        check_same(tried, asked)
        if len(seeds) < len(tried.seeds):
            raise UserError(
                f"seeds = {len(seeds)}: {folder} has {len(tried.seeds)} seeds of each setting; give that many or more, "
                "or leave --seeds out"
            )
        names = {setting.name for setting in settings}
        kept = [setting for setting in tried.settings if setting.name not in names]
        tried.settings, tried.seeds, tried.against = [*settings, *kept], seeds, args.against
    else:
        others = folder.is_dir() and not (folder / NAME).exists() and os.listdir(folder)
        if others and any(not name.startswith(".") for name in others):
            raise UserError(f"{folder}: holds other files; choose another --out_dir for the try")
        tried = Try(folder, preset, given, seeds, settings, args.against, asked=asked)
        check_settings(tried)
        if args.time:
            choose_for_time(args, tried, len(seeds) * (trials or len(settings)))
    check_settings(tried)
    tried.save()
    return tried


def check_settings(tried: "Try") -> None:
    """Raise UserError for a setting whose values cannot be combined, or whose name is another's too."""
    for setting in tried.settings:
        if setting.name not in tried.stopped:  # a search may have drawn values that cannot be combined
            tried.config(setting, tried.seeds[0])
    names = [setting.name for setting in tried.settings]
    if len(set(names)) < len(names):
        raise UserError(f"{max(names, key=names.count)}: two settings have this name; give values that differ more")


def choose_for_time(args: argparse.Namespace, tried: "Try", runs: int) -> None:
    """Divide the time by the runs, and choose the settings that are not given for one of them. Raises UserError."""
    from llm.commands.bars import print_best_effort, progress_bar
    from llm.experiments.jobs import slowest_pace
    from llm.experiments.trials import Setting
    from llm.plan.autopilot import choose_new_run
    from llm.plan.choice_lines import choice_lines
    from llm.plan.request import parse_time, read_request

    seconds = parse_time(args.time) * args.jobs / runs
    first = tried.settings[0] if tried.settings else Setting("first", {})
    given = tried.given | first.changes | {"out_dir": tried.run_dir(first, tried.seeds[0])}
    request = read_request(f"{seconds:.3f}", tried.preset, given, warn)
    together = slowest_pace(args.jobs) if args.jobs > 1 else contextlib.nullcontext()  # as many as will train
    with progress_bar("tokenizing") as progress, together as measure:
        choice = choose_new_run(request, True, warn, progress, measure)
    print_best_effort(f"{runs} runs of {seconds:.0f} s each; the settings of the first:")
    for line in choice_lines(choice):
        print_best_effort(line)
    config = choice.proposal.config
    varied = {name for setting in tried.settings for name in setting.changes}
    if config.optimizer == "muon" and "max_lr" in varied and "muon_lr" not in varied:
        rate = config.muon_lr
        warn(
            f"max_lr is the rate of embeddings, head and norms; the matrices of the blocks have muon_lr = {rate:g} "
            f"in all settings: vary that with --vary muon_lr={rate / 2:g},{rate:g}"
        )
    tried.preset = to_settings(config)
    tried.seconds = seconds
    tried.most_steps = choice.deadline(0).most_steps


def finish(folder: Path) -> None:
    """Print the table of the try, and write its picture and its best setting."""
    from llm import storage
    from llm.commands.bars import print_result
    from llm.commands.look.runs import draw
    from llm.experiments.outcome import best_toml, columns, outcomes
    from llm.experiments.picture import draw_try
    from llm.experiments.trials import read_try
    from llm.record.chart_style import save_figure

    tried = read_try(folder)
    found = outcomes(tried)
    table = columns(tried, found)
    print_result("\n".join(draw(table, left=(next(iter(table)), list(table)[-1]))))
    save_figure(lambda: draw_try(tried, found), folder / "try.png")
    toml = best_toml(tried, found, anchored=True)
    if toml is not None:
        storage.write_text(folder / "best.toml", toml)
        time = " --time 10m" if tried.seconds else ""
        best = shlex.quote(str(folder / "best.toml"))
        print_result(f"in {folder}: try.png, best.toml; next: losscurve train --preset {best}{time}")
