"""`rehearse`: find out on this machine, in less than a minute, whether a run will work on a cluster."""

import argparse
import os
from typing import TYPE_CHECKING, NoReturn

from llm.commands.flags import Parser, add_settings, config_from, given_settings, warn
from llm.config import FIELDS, PRESETS
from llm.errors import UserError

if TYPE_CHECKING:
    from llm.checks.rehearsal import Rehearsal

DESCRIPTION = (
    "Rehearse a run of several processes on this machine, with a smaller model: train, save, kill a process with "
    "SIGKILL, resume in one process, compare with an uninterrupted run. Takes the flags of train. Nothing in out_dir "
    "is changed; exit code 1 if a check fails."
)

MARKS = {True: "ok", False: "FAILED", None: "see"}


def main(argv: list[str]) -> int:
    args = parse(argv)
    config, given = config_from(args), given_settings(args)

    import shutil
    import signal
    import tempfile
    import time
    from pathlib import Path

    from llm.checks.rehearsal import Rehearsal
    from llm.commands.bars import print_result

    began = time.monotonic()
    world_size = args.world_size or args.nproc
    name = f"{world_size} processes with {config.parallel}"
    previous_handler = signal.signal(signal.SIGTERM, _exit)
    folder = Path(tempfile.mkdtemp(prefix="losscurve-rehearsal-"))
    try:
        rehearsal = Rehearsal(config, args.nproc, world_size, args.world_size is None, folder, warn, given)
        print_result(f"rehearsing {name} as {args.nproc} on the CPU of this machine (gloo)")
        results = run(rehearsal)
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
        if args.keep_folder:
            print_result(f"folder kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    seconds = f"({time.monotonic() - began:.0f} s)"
    failed = [check for check, good in results.items() if good is False]
    unknown = [check for check, good in results.items() if good is None]
    if failed:
        print_result(f"the run of {name} will NOT work as it is: fix {' and '.join(failed)} {seconds}")
        return 1
    condition = f", if its machines have enough {' and '.join(unknown)}" if unknown else ""
    print_result(f"the run of {name} will work{condition} {seconds}")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the parsed flags. Raises UserError for wrong ones, and if torchrun started this process."""
    parser = Parser("losscurve rehearse", DESCRIPTION, bare=("text",))
    parser.add_argument("--preset", metavar="NAME|FILE.toml", help=f"settings to start from: {', '.join(PRESETS)}")
    add_settings(parser, FIELDS)
    parser.add_argument("--nproc", type=int, default=2, metavar="N", help="processes to rehearse with (default: 2)")
    parser.add_argument(
        "--world_size",
        type=int,
        metavar="N",
        help="processes of the run itself, on its own machines (default: --nproc, on this machine)",
    )
    parser.add_argument("--keep_folder", action="store_true", help="keep the folder of the rehearsal, to inspect it")
    args = parser.read(argv)
    if not 2 <= args.nproc <= 64:
        raise UserError(f"nproc = {args.nproc}: expected a number of processes from 2 to 64")
    if args.world_size is not None and not 1 <= args.world_size <= 2**20:
        raise UserError(f"world_size = {args.world_size}: expected a number of processes from 1 to {2**20}")
    if "RANK" in os.environ:
        raise UserError("RANK is set, as by torchrun; a rehearsal starts its own processes, so run it without torchrun")
    return args


def run(rehearsal: "Rehearsal") -> dict[str, bool | None]:
    """Print a line for each check of the rehearsal, and return the results by name."""
    from llm.checks.rehearsal import NOT_CHECKED
    from llm.checks.shrink import describe_changes
    from llm.commands.bars import print_result

    print_result(f"smaller: {', '.join(describe_changes(rehearsal.config, rehearsal.small))}")
    results = {}
    for finding in rehearsal.findings():
        print_result(f"{MARKS[finding.good]:<8}{finding.name:<11}{finding.message}")
        results[finding.name] = finding.good
    not_reached = list(rehearsal.stages)[len(results) :]
    if not_reached:
        print_result(f"{'':<8}not reached: {', '.join(not_reached)}")
    print_result(f"not checked: {NOT_CHECKED}")
    return results


def _exit(number: int, frame: object) -> NoReturn:
    """Raise SystemExit, so that the cleanup runs."""
    raise SystemExit(128 + number)
