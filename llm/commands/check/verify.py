"""`verify`: check that the files of a run, or of a folder of token files, have not changed since they were written."""

from pathlib import Path

from llm.commands.flags import Parser, input_path

DESCRIPTION = "Check every file of runs and data folders against its checksum. Exit code 1 if any is damaged."

MARKS = {True: "ok", False: "DAMAGED", None: "-"}


def main(argv: list[str]) -> int:
    parser = Parser("losscurve verify", DESCRIPTION)
    parser.add_argument(
        "folders",
        nargs="*",
        type=input_path,
        default=[Path("checkpoints")],
        metavar="FOLDER",
        help="default: checkpoints",
    )
    args = parser.read(argv)

    from llm.checks.verify import verify
    from llm.commands.bars import print_result

    damaged = 0
    for folder in args.folders:
        for finding in verify(folder):
            print_result(f"{MARKS[finding.good]:<8} {finding.path}: {finding.message}")
            damaged += finding.good is False
    print_result(f"{damaged} damaged" if damaged else "all files that could be checked are unchanged")
    return 1 if damaged else 0
