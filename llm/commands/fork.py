"""`fork RUN --at STEP`: a run that shares the past of another up to a checkpoint, with other settings from there."""

from llm.commands.flags import Parser, add_settings, note, path, typed_settings
from llm.commands.train import add_run_flags
from llm.commands.train import main as train
from llm.config import FIELDS

DESCRIPTION = (
    "Start a run from a checkpoint of RUN, with its past, and train it with the settings that are given from there on. "
    "RUN stays as it is. Most settings can change, but not the text and the shape of the model."
)

RUN_FLAGS = ("--explain", "--watch", "--track", "--nproc")  # those of `add_run_flags`


def main(argv: list[str]) -> int:
    parser = Parser("losscurve fork", DESCRIPTION)
    parser.add_run()
    parser.add_argument("--at", type=int, metavar="STEP", help="a step with a checkpoint; without it, they are named")
    parser.add_argument(
        "--out_dir", type=path, metavar="DIR", help="the new run folder (default: RUN-at-STEP-CHANGES, beside RUN)"
    )
    add_settings(parser, [name for name in FIELDS if name != "out_dir"])
    add_run_flags(parser)
    args = parser.read(argv)

    from llm.commands.bars import print_best_effort
    from llm.start.fork import find_state, fork, usual_folder

    find_state(args.run, args.at)
    changes = {name: value for name, value in typed_settings(args).items() if name != "out_dir"}
    out_dir = args.out_dir or usual_folder(args.run, args.at, changes)
    fork(args.run, args.at, changes, out_dir, note)
    own = ("--at", "--out_dir", *RUN_FLAGS)
    settings = [word for word in args.words if word.startswith("--") and word.partition("=")[0] not in (*own, "--")]
    print_best_effort(f"{out_dir}: forked from {args.run} at step {args.at}: {' '.join(settings) or 'nothing changed'}")
    beside = [word for word in args.words if word.partition("=")[0] in RUN_FLAGS]
    return train(["--resume", f"--out_dir={out_dir}", *beside])
