"""A file of a corpus: one document of UTF-8 text, or a document in each of its rows."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llm.errors import UserError
from llm.text import compressed, recognise, rows
from llm.text.encodings import describe_not_utf8

CHUNK = 2**20  # bytes read at once


@dataclass(frozen=True)
class File:
    """A file of text or of rows; rows hold their text in `field`, a JSON field or a Parquet column."""

    label: str  # its name in messages
    path: Path  # where its bytes are, perhaps a temporary file
    size: int  # bytes
    mtime_ns: int
    field: str = rows.FIELD

    @property
    def in_rows(self) -> bool:
        """Whether each row is a document, instead of the whole file."""
        return rows.has_rows(self.path)

    @property
    def shell_name(self) -> str:
        """The name by which a shell finds the file, "" for a stream or a named text."""
        return self.label if Path(self.label) == self.path else ""

    def read(self) -> Iterator[str]:
        """Return an iterator over the text in pieces of bounded size, or over the documents, one a row.

        Line ends stay as they are; a byte-order mark at the start is dropped.

        Raises:
            UserError: the file cannot be read, or is not UTF-8; names the byte, what the file is instead, and
                the command that makes text of it.
        """
        if self.in_rows:
            return rows.read_rows(self.path, self.label, self.field)
        return self._read_pieces()

    def text_bytes(self) -> int:
        """Return the bytes of text that the file holds, estimated from its beginning if compressed or in rows."""
        if self.in_rows:
            return rows.estimate_text_bytes(self.path, self.label, self.field)
        with compressed.open_decompressed(self.path, self.label) as (file, raw):
            head = file.read(recognise.HEAD)
            recognise.check(head, self.label, self.shell_name)
            if file is raw:
                return self.size
            read_bytes = len(head) + len(file.read(rows.SAMPLE))
            is_at_end = not file.read(1)
            return read_bytes if is_at_end else read_bytes * self.size // raw.tell()

    def _read_pieces(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        done_bytes = 0
        is_first = True
        try:
            with compressed.open_decompressed(self.path, self.label) as (file, _):
                recognise.check(file.read(recognise.HEAD), self.label, self.shell_name)
                file.seek(0)
                while True:
                    content = file.read(CHUNK)
                    pending_bytes = len(decoder.getstate()[0])  # of a character that the last chunk cut
                    text = decoder.decode(content, final=not content)
                    done_bytes += len(content)
                    if text:
                        yield text.removeprefix("\ufeff") if is_first else text
                        is_first = False
                    if not content:
                        return
        except UnicodeDecodeError as error:
            raise self._not_utf8(done_bytes - pending_bytes + error.start) from None

    def _not_utf8(self, place: int) -> UserError:
        """Return the error for a file that stops being UTF-8 at the byte `place`."""
        begin = max(0, place - recognise.HEAD)
        line = 1
        with compressed.open_decompressed(self.path, self.label) as (file, _):
            for start in range(0, begin, CHUNK):
                line += file.read(min(CHUNK, begin - start)).count(b"\n")
            window = file.read(place - begin + recognise.HEAD)
        line += window.count(b"\n", 0, place - begin)
        cause = describe_not_utf8(window, place - begin, self.shell_name, begin)
        return UserError(f"{self.label}: not UTF-8 at byte {place} (line {line}): {cause}")
