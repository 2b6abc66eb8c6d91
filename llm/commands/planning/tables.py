"""Tables for stdout: aligned by rich, without colour, and as wide as their content on a terminal and in a pipe."""

import io
from collections.abc import Iterable, Sequence


def format_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return the lines of a table with right-aligned columns, two spaces apart."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 2), header_style=None)
    for title in titles:
        table.add_column(Text(title), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # a fixed size and no terminal: neither COLUMNS nor FORCE_COLOR nor TERM=dumb changes the lines
    out = io.StringIO()
    Console(file=out, width=10_000, height=100, force_terminal=False, color_system=None).print(table)
    return out.getvalue().rstrip("\n")
