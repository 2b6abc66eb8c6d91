"""`export RUN --to FORMAT`: write a run in the format of another program, and prove that it is the same there."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llm.commands.flags import Parser, path
from llm.config import expanded
from llm.errors import UserError

if TYPE_CHECKING:
    from llm.export.source import Source

DESCRIPTION = "Write a run in the format of another program. What was written is read back, and its token ids and \
logits are compared with the run's; if they differ, nothing is left."
FORMATS = ("hf",)
DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str]) -> int:
    args = parse_flags(argv)

    from llm.commands.flags import warn
    from llm.export.source import open_source

    source = open_source(args.run, args.weights, args.data_dir, warn)
    match args.to:
        case "hf":
            return to_huggingface(args, source)
        case _:
            raise UserError(f"to = {args.to}: expected {' or '.join(FORMATS)}")


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Return the parsed flags. Raises UserError."""
    parser = Parser("losscurve export", DESCRIPTION)
    parser.add_run()
    parser.add_argument("--to", required=True, choices=FORMATS, help="hf: a folder for transformers and its relatives")
    parser.add_argument("--out", metavar="PATH", type=path, help="default: RUN-hf")
    parser.add_argument("--weights", choices=("last", "best"), default="best", help="model.pt or best.pt")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    parser.add_argument("--data_dir", metavar="DIR", type=expanded, help="the run's token files, if they have moved")
    parser.add_argument("--push", metavar="NAME", help="hf: upload it too, as this private repository on the hub")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --out")
    return parser.read(argv)


def to_huggingface(args: argparse.Namespace, source: "Source") -> int:
    """Write the folder for transformers, print the proof, and upload it if asked to."""
    from llm.commands.bars import print_result
    from llm.export.huggingface import export, push

    out = args.out or Path(f"{args.run}-hf")
    print_result(str(export(source, out, args.dtype, args.overwrite, args.push)))
    size = sum(file.stat().st_size for file in out.iterdir())
    print_result(f"wrote {out}/ ({size / 2**20:.1f} MiB)")
    if args.push:
        print_result(f"uploaded to {push(out, args.push)}")
    return 0
