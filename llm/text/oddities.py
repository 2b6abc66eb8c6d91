"""What stands in a text that a person may not expect there: counted and said, and left as it is."""

import json
from collections.abc import Iterator

from llm.text.recognise import convert

MARKED = {  # what is counted, how it is called, and the filter that takes it out of a file
    "\r\n": ("CRLF line end(s), as Windows writes them", "tr -d '\\r'"),
    "\ufeff": ("byte-order mark(s) inside the text", "perl -pe 's/\\xEF\\xBB\\xBF//g'"),
    "\0": ("NUL character(s)", "tr -d '\\000'"),
    "<|endoftext|>": ("times <|endoftext|>", ""),
}


OVERLAP = max(map(len, MARKED)) - 1


MARKUP = {  # an ending, and what a file of that ending holds besides its text
    ".json": "JSON",
    ".csv": "a table (CSV)",
    ".tsv": "a table (TSV)",
    ".html": "HTML",
    ".htm": "HTML",
    ".xml": "XML",
}


REMEDIES = {
    "JSON": "rows, an object a line in a file that ends in .jsonl, are read without their brackets",
    "a table (CSV)": "as .jsonl or .parquet its texts are read alone, from the column that --text_field names",
    "a table (TSV)": "as .jsonl or .parquet its texts are read alone, from the column that --text_field names",
    "XML": "its tags are in the text",
}


class Oddities:
    """Counts over the files of a text, which `begin` one after the other."""

    def __init__(self) -> None:
        self._found: dict[str, list[tuple[str, str, int]]] = {}  # by kind: (file, name for a shell, count)

    def begin(self, label: str, name: str, in_rows: bool) -> None:
        """The next pieces belong to the file `label`, which a shell knows by `name`, "" if it does not."""
        self._label, self._name, self._in_rows = label, "" if in_rows else name, in_rows
        self._tail: str | None = None  # the end of the last piece, where a mark may have begun

    def add(self, piece: str) -> None:
        if self._tail is None and not self._in_rows and (kind := _markup(self._label, piece)):
            self._add(kind, 1)
        tail = "" if self._in_rows else self._tail or ""
        joined = tail + piece
        for mark in MARKED:
            if mark[0] in joined and (count := joined.count(mark) - tail.count(mark)):
                self._add(mark, count)
        self._tail = joined[-OVERLAP:]

    def _add(self, kind: str, count: int) -> None:
        files = self._found.setdefault(kind, [])
        if files and files[-1][0] == self._label:
            files[-1] = (self._label, self._name, files[-1][2] + count)
        else:
            files.append((self._label, self._name, count))

    def notices(self) -> Iterator[str]:
        """A line for each kind of thing that was found."""
        for kind in (kind for kind in (*dict.fromkeys(MARKUP.values()), *MARKED) if kind in self._found):
            files = self._found[kind]
            label, name, _ = files[0]
            where = label + (f" and {len(files) - 1} more file(s)" if len(files) > 1 else "")
            if kind not in MARKED:
                remedy = REMEDIES.get(kind) or f"for its text alone: {convert('pandoc -f html -t plain', name)}"
                yield f"{where}: read as plain text, though it is {kind}; {remedy}"
                continue
            what, command = MARKED[kind]
            total = sum(count for _, _, count in files)
            if not command:
                remedy = "ordinary text here, not the token; documents in files or rows of their own have it between"
            else:
                remedy = "kept as they are" + (f"; without them: {convert(command, name)}" if name else "")
            yield f"{where}: {total:,} {what}: {remedy}"


def _markup(label: str, begin: str) -> str:
    """What a text is besides text, by the file's name or its first characters; "" for a plain one."""
    plain = label.lower().removesuffix(".gz").removesuffix(".zst")
    for ending, kind in MARKUP.items():
        if plain.endswith(ending):
            return kind
    start = begin[:100].lstrip().lower()
    if start.startswith(("<!doctype html", "<html")):
        return "HTML"
    if start.startswith("{"):
        try:
            return "JSON" if isinstance(json.loads(begin.lstrip().partition("\n")[0]), dict) else ""
        except (ValueError, RecursionError):
            return ""
    return ""
