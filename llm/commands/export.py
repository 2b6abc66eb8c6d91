"""`export RUN --to FORMAT`: write a run in the format of another program, and prove that it is the same there."""

import argparse
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from llm.commands.flags import Parser, path
from llm.config import expanded
from llm.errors import UserError

if TYPE_CHECKING:
    from llm.export.source import Source

DESCRIPTION = "Write a run in the format of another program. What was written is read back, and its token ids and \
logits are compared with the run's; if they differ, nothing is left."
FORMATS = ("hf", "gguf", "html")
DTYPES = {  # the first: by default
    "hf": ("float32", "bfloat16", "float16"),
    "gguf": ("float32", "bfloat16", "float16", "q8_0"),
    "html": ("float16", "int8", "float32"),
}


def main(argv: list[str]) -> int:
    args = parse_flags(argv)

    from llm.commands.flags import warn
    from llm.export.source import open_source

    write = {"hf": to_huggingface, "gguf": to_gguf, "html": to_html}[args.to]
    previous_handler = signal.signal(signal.SIGTERM, _exit)
    try:
        return write(args, open_source(args.run, args.to, args.weights, args.data_dir, warn))
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def _exit(number: int, frame: object) -> NoReturn:
    """Raise SystemExit, so that what is half-written is removed."""
    raise SystemExit(128 + number)


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Return the parsed flags. Raises UserError."""
    parser = Parser("losscurve export", DESCRIPTION)
    parser.add_run()
    parser.add_argument(
        "--to",
        required=True,
        choices=FORMATS,
        help="hf: a folder for transformers and its relatives; gguf: a file for llama.cpp and Ollama; html: a file "
        "that runs the model in a browser",
    )
    parser.add_argument("--out", metavar="PATH", type=path, help="default: RUN-hf, RUN.gguf or RUN.html")
    parser.add_argument("--weights", choices=("last", "best"), default="best", help="model.pt or best.pt")
    parser.add_argument(
        "--dtype",
        choices=sorted({dtype for all_ in DTYPES.values() for dtype in all_}),
        help="of the weights (default: float32; html: float16); q8_0, 8 bits, is for gguf, and int8 for html",
    )
    parser.add_argument("--data_dir", metavar="DIR", type=expanded, help="the run's token files, if they have moved")
    parser.add_argument("--push", metavar="NAME", help="hf: upload it too, as this private repository on the hub")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --out")
    args = parser.read(argv)
    args.dtype = args.dtype or DTYPES[args.to][0]
    if args.dtype not in DTYPES[args.to]:
        raise UserError(f"dtype = {args.dtype}: --to {args.to} has {', '.join(DTYPES[args.to])}")
    if args.push and args.to != "hf":
        raise UserError(f"push: the hub takes --to hf, not --to {args.to}")
    return args


def path_for(run: str | Path, ending: str) -> Path:
    """Return the path of an export beside a run."""
    from llm.start.run_folder import by_its_name

    folder = by_its_name(Path(run))
    return folder.with_name(folder.name + ending)


def to_huggingface(args: argparse.Namespace, source: "Source") -> int:
    """Write the folder for transformers, print the proof, and upload it if asked to."""
    from llm.commands.bars import print_result
    from llm.export.huggingface import export, push

    out = args.out or path_for(args.run, "-hf")
    print_result(str(export(source, out, args.dtype, args.overwrite, args.push)))
    size = sum(file.stat().st_size for file in out.iterdir())
    print_result(f"wrote {out}/ ({size / 2**20:.1f} MiB)")
    if args.push:
        print_result(f"uploaded to {push(out, args.push)}")
    return 0


def to_gguf(args: argparse.Namespace, source: "Source") -> int:
    """Write the file for llama.cpp, and print the proof."""
    from llm.commands.bars import print_result
    from llm.export.gguf_export import export_gguf

    out = args.out or path_for(args.run, ".gguf")
    export_gguf(source, out, args.dtype, args.overwrite, print_result)
    print_result(f"wrote {out} ({out.stat().st_size / 2**20:.1f} MiB)")
    print_result(f"serve it with: llama-server -m {shlex.quote(str(out))}")
    return 0


def to_html(args: argparse.Namespace, source: "Source") -> int:
    """Write the file for a browser, and print the proof."""
    from llm.commands.bars import print_result
    from llm.export.html import export

    out = args.out or path_for(args.run, ".html")
    print_result(str(export(source, out, args.dtype, args.overwrite)))
    return 0
