"""`runs [FOLDER]`: a table of the runs below a folder, with their best losses."""

import math
import time
from typing import TYPE_CHECKING, Any

from llm.commands.flags import Parser, input_path

if TYPE_CHECKING:
    from pathlib import Path

    from llm.record.runs import Summary


DESCRIPTION = "List the runs in and below a folder with their best losses. Losses of different tokenizers compare by \
bits per byte only, and those of different texts not at all. Damaged runs are listed with the reason."


SORT = {  # key: field of the summary, and whether the largest comes first
    "bits": ("bits_per_byte", False),
    "best": ("best", False),
    "last": ("last", False),
    "run": ("path", False),
    "steps": ("step", True),
    "params": ("parameters", True),
    "speed": ("tokens_per_second", True),
    "written": ("written", True),
}


LEFT_OUT = ("params", "tokens/s", "last val", "written", "at step", "steps", "bits/byte")  # first where it is narrow


GAP = "  "


NAME_WIDTH = 20  # of a run's name, where it is narrow


def main(argv: list[str]) -> int:
    parser = Parser("losscurve runs", DESCRIPTION)
    parser.add_argument(
        "folder", nargs="?", default=".", metavar="FOLDER", type=input_path, help="default: where you are"
    )
    parser.add_argument(
        "--sort", choices=tuple(SORT), default="bits", help="best first (default: bits per byte, then loss)"
    )
    parser.add_argument("--json", action="store_true", help="a JSON array with everything, for other programs")
    args = parser.read(argv)

    import json
    import sys

    from llm.commands.bars import print_result
    from llm.commands.flags import warn
    from llm.record.runs import FOLDERS, find, summary

    paths, whole = find(args.folder)
    runs = ordered([summary(path) for path in paths], args.sort)
    if not whole:
        warn(f"stopped after {FOLDERS:,} folders; give a folder nearer to the runs")
    if args.json:
        print_result(json.dumps([vars(run) | {"path": str(run.path)} for run in runs], indent=2))
    elif not runs:
        print_result(f"no run in or below {args.folder}; losscurve train makes one")
    else:
        print_result("\n".join(table(runs, args.folder, width() if sys.stdout.isatty() else None)))
    return 0


def width() -> int:
    import shutil

    return shutil.get_terminal_size().columns


def ordered(runs: "list[Summary]", key: str) -> "list[Summary]":
    """The runs by a key of SORT, those without it last; of equals, the lower loss first."""
    field, largest_first = SORT[key]

    def place(run: "Summary") -> tuple[Any, ...]:
        value, loss = getattr(run, field), math.inf if run.best is None else run.best
        if value is None:
            return True, 0, loss, run.path
        return False, -value if largest_first else value, loss, run.path

    return sorted(runs, key=place)


def table(runs: "list[Summary]", folder: "Path", room: int | None = None) -> list[str]:
    """Lines of a table; where it would be wider than `room`, names are shortened and what matters least left out."""
    from llm.record.chart_style import plain

    names = [str(folder if run.path == folder else run.path.relative_to(folder)) for run in runs]
    columns = {
        "run": [plain(name, 200) for name in names],
        "steps": [f"{said(run.step, ',') or '?'}/{said(run.max_steps, ',') or '?'}" for run in runs],
        "best val": [said(run.best, ".4f") for run in runs],
        "bits/byte": [said(run.bits_per_byte, ".3f") for run in runs],
        "at step": [said(run.best_step, ",") for run in runs],
        "last val": [said(run.last, ".4f") for run in runs],
        "params": [said(run.parameters and run.parameters / 1e6, ".2f", " M") for run in runs],
        "tokens/s": [said(run.tokens_per_second, ",.0f") for run in runs],
        "written": [when(run.written) for run in runs],
        "state": [plain(f"{run.state}: {run.reason}" if run.reason else run.state, 300) for run in runs],
    }
    narrow = room is not None and total_width(columns) > room
    if narrow:
        columns |= {"run": [plain(name, NAME_WIDTH) for name in names], "state": [run.state for run in runs]}
    gone: list[str] = []
    while room is not None and total_width(columns) > room and len(gone) < len(LEFT_OUT):
        gone.append(LEFT_OUT[len(gone)])
        del columns[gone[-1]]
    padded = [[head, *cells] for head, cells in columns.items()]
    padded = [aligned(column, left=column[0] in ("run", "state")) for column in padded]
    lines = [GAP.join(row).rstrip() for row in zip(*padded, strict=True)]
    if not narrow:
        return lines
    reasons = [
        f"{plain(name, 200)}: {plain(run.reason, 300)}" for name, run in zip(names, runs, strict=True) if run.reason
    ]
    left_out = f", without {', '.join(gone)}" if gone else ""
    return [*lines, *reasons, f"(shortened{left_out}; a wider terminal, a pipe and --json have all)"]


def aligned(cells: list[str], left: bool) -> list[str]:
    """The cells of a column, padded to the widest on a terminal."""
    from rich.cells import cell_len

    widest = max(map(cell_len, cells))
    fill = [" " * (widest - cell_len(cell)) for cell in cells]
    return [cell + space if left else space + cell for cell, space in zip(cells, fill, strict=True)]


def total_width(columns: dict[str, list[str]]) -> int:
    from rich.cells import cell_len

    widths = [max(map(cell_len, [head, *cells])) for head, cells in columns.items()]
    return sum(widths) + len(GAP) * (len(widths) - 1)


def said(value: float | None, how: str, unit: str = "") -> str:
    """A number in a format, nothing for None."""
    return "" if value is None else format(value, how) + unit


def when(written: float | None) -> str:
    """A time here, to the minute."""
    return "" if written is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(written))
