"""`rehearse`: whether a run on a cluster will hold together, found out on this machine in less than a minute."""

import os
from typing import NoReturn

from llm.commands.flags import Parser, add_settings, config_from, warn
from llm.config import FIELDS, PRESETS
from llm.errors import UserError

DESCRIPTION = (
    "Rehearse a run of several processes on this machine, with a smaller model: train, save, lose a process to "
    "SIGKILL, resume in one process, compare with an undisturbed run. Takes the flags of train. Nothing in out_dir is "
    "touched; exit code 1 if a check fails."
)


MARKS = {True: "ok", False: "FAILED", None: "see"}


def main(argv: list[str]) -> int:
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
    parser.add_argument("--keep_folder", action="store_true", help="leave the folder of the rehearsal, to look at")
    args = parser.read(argv)
    config = config_from(args)
    if not 2 <= args.nproc <= 64:
        raise UserError(f"nproc = {args.nproc}: expected a number of processes from 2 to 64")
    if args.world_size is not None and not 1 <= args.world_size <= 2**20:
        raise UserError(f"world_size = {args.world_size}: expected a number of processes from 1 to {2**20}")
    if "RANK" in os.environ:
        raise UserError("RANK is set, as by torchrun; a rehearsal starts its own processes, so run it without")

    import shutil
    import signal
    import tempfile
    import time
    from pathlib import Path

    from llm.checks.rehearsal import Rehearsal
    from llm.checks.rehearse import NOT_CHECKED, changes
    from llm.commands.bars import print_result

    before = signal.signal(signal.SIGTERM, _leave)
    began, world_size = time.monotonic(), args.world_size or args.nproc
    folder = Path(tempfile.mkdtemp(prefix="losscurve-rehearsal-"))
    try:
        rehearsal = Rehearsal(config, args.nproc, world_size, args.world_size is None, folder, warn)
        what = f"{world_size} processes with {config.parallel}"
        print_result(f"rehearsing {what} as {args.nproc} on the CPU of this machine (gloo)")
        print_result(f"smaller: {', '.join(changes(rehearsal.config, rehearsal.small))}")
        found = []
        for finding in rehearsal.findings():
            print_result(f"{MARKS[finding.good]:<8}{finding.name:<11}{finding.words}")
            found.append(finding)
        if left := list(rehearsal.stages)[len(found) :]:
            print_result(f"{'':<8}not reached: {', '.join(left)}")
        print_result(f"not checked: {NOT_CHECKED}")
    finally:
        signal.signal(signal.SIGTERM, before)
        if args.keep_folder:
            print_result(f"left for you: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    failed = [finding.name for finding in found if finding.good is False]
    took = f"({time.monotonic() - began:.0f} s)"
    if failed:
        print_result(f"the run of {what} will NOT hold together as it is: mend {' and '.join(failed)} {took}")
        return 1
    if ask := [finding.name for finding in found if finding.good is None]:
        print_result(f"the run of {what} will hold together, if its machines have the {' and '.join(ask)} {took}")
    else:
        print_result(f"the run of {what} will hold together {took}")
    return 0


def _leave(number: int, frame: object) -> NoReturn:
    """End by way of what cleans up."""
    raise SystemExit(128 + number)
