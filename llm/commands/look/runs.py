"""`runs [FOLDER]`: print a table of the runs below a folder, with their best losses."""

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llm.commands.flags import Parser, input_path

if TYPE_CHECKING:
    from pathlib import Path

    from llm.record.runs import Summary

DESCRIPTION = "List the runs in and below a folder with their best losses. Losses of different tokenizers can be \
compared in bits per byte only, and those of different texts not at all. Damaged runs are listed with the reason."

# key: field of the summary, and whether the largest comes first
SORT = {
    "bits": ("bits_per_byte", False),
    "best": ("best", False),
    "last": ("last", False),
    "run": ("path", False),
    "steps": ("step", True),
    "params": ("parameters", True),
    "speed": ("tokens_per_second", True),
    "written": ("written", True),
}

# columns that a narrow terminal drops, in this order
OPTIONAL = ("params", "tokens/s", "last val", "written", "at step", "steps", "bits/byte")

LEFT_ALIGNED = ("run", "state")

GAP = 2  # spaces between columns

UNLIMITED = 100_000  # characters of a line

# maximum number of characters shown
NAME_LENGTH = 200
SHORT_NAME_LENGTH = 20  # on a narrow terminal
REASON_LENGTH = 300


def main(argv: list[str]) -> int:
    parser = Parser("losscurve runs", DESCRIPTION)
    parser.add_argument(
        "folder", nargs="?", default=".", metavar="FOLDER", type=input_path, help="default: the current folder"
    )
    parser.add_argument(
        "--sort", choices=tuple(SORT), default="bits", help="best first (default: bits per byte, then loss)"
    )
    parser.add_argument("--json", action="store_true", help="a JSON array with all facts, for other programs")
    args = parser.read(argv)

    import json
    import sys

    from llm.commands.bars import print_result
    from llm.commands.flags import warn
    from llm.record.runs import FOLDERS, find, summary

    paths, is_complete = find(args.folder)
    runs = sort_runs([summary(path) for path in paths], args.sort)
    if not is_complete:
        warn(f"stopped after {FOLDERS:,} folders; give a folder nearer to the runs")
    if args.json:
        print_result(json.dumps([vars(run) | {"path": str(run.path)} for run in runs], indent=2))
    elif not runs:
        print_result(f"no run in or below {args.folder}; losscurve train makes one")
    else:
        room = terminal_width() if sys.stdout.isatty() else None
        print_result("\n".join(table(runs, args.folder, room)))
    return 0


def terminal_width() -> int:
    """Return the width of the terminal in characters."""
    import shutil

    return shutil.get_terminal_size().columns


def sort_runs(runs: "list[Summary]", key: str) -> "list[Summary]":
    """Sort the runs by a key of SORT; runs without that value come last, and ties are ordered by loss."""
    field, largest_first = SORT[key]

    def sort_key(run: "Summary") -> tuple[Any, ...]:
        value = getattr(run, field)
        loss = math.inf if run.best is None else run.best
        if value is None:
            return True, 0, loss, run.path
        return False, -value if largest_first else value, loss, run.path

    return sorted(runs, key=sort_key)


def table(runs: "list[Summary]", folder: "Path", room: int | None = None) -> list[str]:
    """Return the lines of a table of runs below `folder`.

    If it is wider than `room` characters, names are shortened, reasons come below the table, and columns of OPTIONAL
    are dropped until it fits.
    """
    from llm.record.chart_style import plain

    names = [str(folder if run.path == folder else run.path.relative_to(folder)) for run in runs]
    columns = columns_of(runs, names)
    if room is None or total_width(columns) <= room:
        return draw(columns)
    columns["run"] = [plain(name, SHORT_NAME_LENGTH) for name in names]
    columns["state"] = [run.state for run in runs]
    dropped: list[str] = []
    for title in OPTIONAL:
        if total_width(columns) <= room:
            break
        del columns[title]
        dropped.append(title)
    lines = draw(columns)
    for name, run in zip(names, runs, strict=True):
        if run.reason:
            lines.append(f"{plain(name, NAME_LENGTH)}: {plain(run.reason, REASON_LENGTH)}")
    without = f", without {', '.join(dropped)}" if dropped else ""
    lines.append(f"(shortened{without}; a wider terminal, a pipe and --json show everything)")
    return lines


def columns_of(runs: "list[Summary]", names: list[str]) -> dict[str, list[str]]:
    """Return the cells of each column, by title."""
    from llm.record.chart_style import plain

    states = [f"{run.state}: {run.reason}" if run.reason else run.state for run in runs]
    millions = [None if run.parameters is None else run.parameters / 1e6 for run in runs]
    return {
        "run": [plain(name, NAME_LENGTH) for name in names],
        "steps": [f"{number(run.step, ',') or '?'}/{number(run.max_steps, ',') or '?'}" for run in runs],
        "best val": [number(run.best, ".4f") for run in runs],
        "bits/byte": [number(run.bits_per_byte, ".3f") for run in runs],
        "at step": [number(run.best_step, ",") for run in runs],
        "last val": [number(run.last, ".4f") for run in runs],
        "params": [number(count, ".2f", " M") for count in millions],
        "tokens/s": [number(run.tokens_per_second, ",.0f") for run in runs],
        "written": [local_time(run.written) for run in runs],
        "state": [plain(state, REASON_LENGTH) for state in states],
    }


def draw(columns: dict[str, list[str]], left: Sequence[str] = LEFT_ALIGNED) -> list[str]:
    """Return the lines of a table without borders and colours, with the columns `left` aligned to the left.

    rich aligns cells by their width on a terminal, where a wide character takes two columns.
    """
    import io

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawing = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for title in columns:
        drawing.add_column(title, justify="left" if title in left else "right", no_wrap=True)
    for cells in zip(*columns.values(), strict=True):
        drawing.add_row(*(Text(cell) for cell in cells))  # as Text, names are not read as markup
    output = io.StringIO()
    Console(file=output, width=UNLIMITED, color_system=None, force_jupyter=False, legacy_windows=False).print(drawing)
    return [line.rstrip() for line in output.getvalue().splitlines()]


def total_width(columns: dict[str, list[str]]) -> int:
    """Return the width of the table in characters of a terminal."""
    from rich.cells import cell_len

    widths = [max(map(cell_len, [title, *cells])) for title, cells in columns.items()]
    return sum(widths) + GAP * (len(widths) - 1)


def number(value: float | None, how: str, unit: str = "") -> str:
    """Format a number; "" for None."""
    return "" if value is None else format(value, how) + unit


def local_time(seconds: float | None) -> str:
    """Format a time, in seconds since 1970, to the minute in the local time zone; "" for None."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
