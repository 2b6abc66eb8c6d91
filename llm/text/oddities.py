"""Contents of a text that the user may not expect, such as CRLF line ends or HTML: counted, reported, never changed."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from llm.text.compressed import SUFFIXES
from llm.text.conversion import conversion_command

MARKS = {  # the characters counted, their description, and the filter that removes them ("" if none is needed)
    "\r\n": ("CRLF line end(s), as Windows writes them", "tr -d '\\r'"),
    "\ufeff": ("byte-order mark(s) inside the text", "perl -pe 's/\\xEF\\xBB\\xBF//g'"),
    "\0": ("NUL character(s)", "tr -d '\\000'"),
    "<|endoftext|>": ("times <|endoftext|>", ""),
}


OVERLAP = max(map(len, MARKS)) - 1  # characters of a piece that may begin a mark


MARKUP = {  # the suffix of a file, and what such a file holds besides its text
    ".json": "JSON",
    ".csv": "a table (CSV)",
    ".tsv": "a table (TSV)",
    ".html": "HTML",
    ".htm": "HTML",
    ".xml": "XML",
}


REMEDIES = {
    "JSON": "to read only its texts, write one JSON object a line into a .jsonl file",
    "XML": "its tags are part of the text",
}


DIALECTS = {"a table (CSV)": "excel", "a table (TSV)": "excel-tab"}  # of Python's csv module


TO_ROWS = (  # a filter; csv refuses fields of more than 131,072 characters by default
    "python3 -c 'import csv, json; csv.field_size_limit(2**31 - 1); [print(json.dumps(row)) for row in "
    """csv.DictReader(open(0, encoding="utf-8-sig", newline=""), dialect="{dialect}")]'"""
)


@dataclass
class Count:
    """How often a file holds something."""

    label: str
    shell_name: str
    count: int


class Oddities:
    """Counts over the files of a text; call `begin` for each file, then `add` for each of its pieces."""

    def __init__(self) -> None:
        self._counts: dict[str, list[Count]] = {}  # by the mark or the markup; one for each file

    def begin(self, label: str, shell_name: str, in_rows: bool) -> None:
        """Begin the next file."""
        self._label = label
        self._shell_name = "" if in_rows else shell_name  # no filter changes rows
        self._in_rows = in_rows
        self._tail: str | None = None  # the end of the last piece, where a mark may begin; None before the first piece

    def add(self, piece: str) -> None:
        """Count what the next piece of the file holds."""
        if self._tail is None and not self._in_rows:
            markup = _detect_markup(self._label, piece)
            if markup:
                self._increase(markup, 1)
        tail = self._tail or ""
        if self._in_rows:
            tail = ""  # no mark reaches from one row into the next
        joined = tail + piece
        for mark in MARKS:
            if mark[0] not in joined:  # faster than counting the mark
                continue
            count = joined.count(mark) - tail.count(mark)
            if count:
                self._increase(mark, count)
        self._tail = joined[-OVERLAP:]

    def _increase(self, kind: str, count: int) -> None:
        counts = self._counts.setdefault(kind, [])
        if not counts or counts[-1].label != self._label:
            counts.append(Count(self._label, self._shell_name, 0))
        counts[-1].count += count

    def notices(self) -> Iterator[str]:
        """Yield a line for each kind of thing that was found."""
        for markup in dict.fromkeys(MARKUP.values()):
            if markup in self._counts:
                yield _describe_markup(markup, self._counts[markup])
        for mark in MARKS:
            if mark in self._counts:
                yield _describe_mark(mark, self._counts[mark])


def _describe_markup(markup: str, counts: list[Count]) -> str:
    if markup in DIALECTS:
        remedy = _describe_rows(markup, counts[0].shell_name)
    else:
        command = conversion_command("pandoc -f html -t plain", counts[0].shell_name)
        remedy = REMEDIES.get(markup) or f"to get its text alone: {command}"
    return f"{_list_files(counts)}: read as plain text, though it is {markup}; {remedy}"


def _describe_rows(table: str, shell_name: str) -> str:
    """Return how to read a column of a table alone."""
    remedy = "to read only the texts of a column, give it as JSON Lines, and the column by --text_field"
    command = _rows_command(table, shell_name)
    return f"{remedy}; to write them: {command}" if command else remedy


def rows_command(label: str, shell_name: str) -> str:
    """Return the command that writes the rows of a file as JSON Lines, "" if its name is not that of a table."""
    markup = _markup_of_name(label)
    return _rows_command(markup, shell_name) if markup in DIALECTS else ""


def _rows_command(table: str, shell_name: str) -> str:
    if not shell_name:  # the rows of a stream would be read as plain text too
        return ""
    return conversion_command(TO_ROWS.format(dialect=DIALECTS[table]), shell_name, ".jsonl")


def _describe_mark(mark: str, counts: list[Count]) -> str:
    description, filter_command = MARKS[mark]
    if not filter_command:
        remedy = "ordinary text, not the token; to put the token between documents, give each its own file or row"
    elif counts[0].shell_name:
        remedy = f"kept as they are; to remove them: {conversion_command(filter_command, counts[0].shell_name)}"
    else:
        remedy = "kept as they are"
    total = sum(each.count for each in counts)
    return f"{_list_files(counts)}: {total:,} {description}: {remedy}"


def _list_files(counts: list[Count]) -> str:
    others = f" and {len(counts) - 1} more file(s)" if len(counts) > 1 else ""
    return counts[0].label + others


def _detect_markup(label: str, first_piece: str) -> str:
    """Return the markup of a text, by the file's name or its first characters; "" for plain text."""
    if markup := _markup_of_name(label):
        return markup
    start = first_piece[:100].lstrip().lower()
    if start.startswith(("<!doctype html", "<html")):
        return "HTML"
    if start.startswith("{"):
        first_line = first_piece.lstrip().partition("\n")[0]
        return "JSON" if _is_json_object(first_line) else ""
    return ""


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _markup_of_name(label: str) -> str:
    name = label.lower()
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return next((markup for suffix, markup in MARKUP.items() if name.endswith(suffix)), "")
