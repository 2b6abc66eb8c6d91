"""`verify`: whether a run, or a folder of token files, is still what was written."""

from pathlib import Path

from llm.commands.flags import Parser, input_path

DESCRIPTION = "Check every file of runs and data folders against its checksum. Exit code 1 if any is damaged."


WORDS = {True: "ok", False: "DAMAGED", None: "-"}


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
            print_result(f"{WORDS[finding.good]:<8} {finding.path}: {finding.words}")
            damaged += finding.good is False
    print_result(f"{damaged} damaged" if damaged else "all that could be checked is as it was written")
    return 1 if damaged else 0
