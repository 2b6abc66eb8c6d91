"""Where text comes from: a person's files, folders or standard input, a named text, the one Python carries.

A document is a file, or a row of a file of rows; those are never counted one by one, as there may be millions.
"""

import codecs
import hashlib
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from llm import storage
from llm.config import NO_PATH, check_expanded, is_pattern, shown
from llm.errors import Failure, UserError
from llm.storage import download
from llm.text import compressed, folders, hub, recognise, rows
from llm.text.oddities import Oddities
from llm.text.rows import FIELD, in_rows, read_rows

SHAKESPEARE = "shakespeare"


SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


BUILT_IN = "pydoc topics"


CHUNK = 2**20  # bytes read at once


ROW_END = b"\xff"  # in the hash of a text; no UTF-8 has this byte


@dataclass(frozen=True)
class File:
    """Text, or rows of it: `label` names it to a person, `path` is where its bytes are (perhaps a temporary file).

    `field` is the field or column of rows that holds the text.
    """

    label: str
    path: Path
    size: int  # bytes
    mtime_ns: int
    field: str = FIELD

    @property
    def in_rows(self) -> bool:
        """Whether it holds a document in each row, instead of being one."""
        return in_rows(self.path)

    @property
    def name(self) -> str:
        """Its name for a shell; a stream or a text by name has none."""
        return self.label if Path(self.label) == self.path else ""

    def read(self) -> Iterator[str]:
        """The text in pieces of bounded size, line ends as they are, without a byte-order mark at its start; or the
        documents, a row each.

        Raises UserError if it cannot be read, or is not UTF-8 (saying at which byte, what it is instead, and what makes
        text of it).
        """
        return read_rows(self.path, self.label, self.field) if self.in_rows else self._pieces()

    def text_bytes(self) -> int:
        """About how many bytes of text it holds: judged by its beginning where it is compressed or has rows."""
        if self.in_rows:
            return rows.text_bytes(self.path, self.label, self.field)
        with compressed.opened(self.path, self.label) as (file, raw):
            head = file.read(recognise.HEAD)
            recognise.check(head, self.label, self.name)
            if file is raw:
                return self.size
            read = len(head) + len(file.read(rows.SAMPLE))
            return read * self.size // raw.tell() if file.read(1) else read

    def _pieces(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        done, first = 0, True
        try:
            with compressed.opened(self.path, self.label) as (file, _):
                recognise.check(file.read(recognise.HEAD), self.label, self.name)
                file.seek(0)
                while True:
                    content = file.read(CHUNK)
                    waiting = len(decoder.getstate()[0])  # bytes of a character that the last piece cut
                    text = decoder.decode(content, final=not content)
                    done += len(content)
                    if text:
                        yield text.removeprefix("\ufeff") if first else text
                        first = False
                    if not content:
                        return
        except UnicodeDecodeError as error:
            raise self._not_utf8(done - waiting + error.start) from None

    def _not_utf8(self, place: int) -> UserError:
        """The error that says where the text stops being UTF-8, and what it is there."""
        with compressed.opened(self.path, self.label) as (file, _):
            line, begin = 1, max(0, place - recognise.HEAD)
            for start in range(0, begin, CHUNK):
                line += file.read(min(CHUNK, begin - start)).count(b"\n")
            window = file.read(place - begin + recognise.HEAD)
        line += window.count(b"\n", 0, place - begin)
        cause = recognise.not_utf8(window, place - begin, self.name, begin)
        return UserError(f"{self.label}: not UTF-8 at byte {place} (line {line}): {cause}")


@dataclass(frozen=True)
class Corpus:
    """Files in their order. `missing` says why the text that was wanted is not what this is, or is empty."""

    name: str
    files: list[File]
    missing: str = ""

    def stamps(self) -> list[dict[str, Any]]:
        """What tells that the files are the same, without reading them."""
        return [{"path": f.label, "size": f.size, "mtime_ns": f.mtime_ns} for f in self.files]


@dataclass
class Survey:
    """What the first reading found."""

    characters: list[int] = field(default_factory=list)  # of each file
    documents: int = 0  # that are not empty
    bytes: int = 0
    sha256: str = ""  # of all documents' UTF-8, joined; with ROW_END after each row, as its end makes a token
    alphabet: set[str] = field(default_factory=set)
    notices: list[str] = field(default_factory=list)  # a line for each kind of thing that a person may not expect

    @property
    def total(self) -> int:
        return sum(self.characters)


@contextmanager
def opened(
    text: tuple[str, ...],
    offline: bool = False,
    limit: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    text_field: str | None = None,
) -> Iterator[Corpus]:
    """The corpus that `text` names: files, folders, `-` (standard input), a name; nothing is the default.

    The default is tiny Shakespeare, or the text that Python carries where that cannot be had. Of a text from the hub,
    `limit` characters are taken. Rows have their text in the field or column `text_field`. Standard input and pipes are
    copied to a temporary file that lives as long as the block. What a search of folders found and left out is said.
    Raises UserError, and Failure for a named text that cannot be had.
    """
    with tempfile.TemporaryDirectory(prefix="losscurve-") as folder:
        if text:
            files: list[File] = []
            for word in text:
                named = word in hub.TEXTS
                if named:
                    files.append(_file(word, hub.fetch(word, limit, offline, say)))
                else:
                    found = _files(word, folder, offline, say)
                    files += [replace(file, field=text_field or FIELD) for file in found]
            if text_field not in (None, FIELD) and not any(f.in_rows and f.field == text_field for f in files):
                raise UserError(
                    f"text_field = {text_field!r}: is for rows of {', '.join(rows.SUFFIXES)}, "
                    "and there are none; leave it out"
                )
            yield Corpus(name_of(text), files)
            return
        try:
            corpus = Corpus(SHAKESPEARE, [_shakespeare(offline)])
        except Failure as failure:
            corpus = Corpus(BUILT_IN, [_built_in(Path(folder))], str(failure))
        yield corpus


def look(source: Corpus, alphabet: bool = False) -> Survey:
    """The first reading: counts, the hash, and on demand the distinct characters. UserError if it is not UTF-8."""
    survey, digest, oddities = Survey(), hashlib.sha256(), Oddities()
    for file in source.files:
        survey.characters.append(0)
        oddities.begin(file.label, file.name, file.in_rows)
        for chunk in file.read():
            content = chunk.encode("utf-8")
            digest.update(content)
            survey.bytes += len(content)
            survey.characters[-1] += len(chunk)
            oddities.add(chunk)
            if file.in_rows and chunk:
                survey.documents += 1
                digest.update(ROW_END)
            if alphabet:
                survey.alphabet.update(chunk)
        survey.documents += not file.in_rows and survey.characters[-1] > 0
    survey.sha256 = digest.hexdigest()
    survey.notices = list(oddities.notices())
    return survey


def span(source: Corpus, survey: Survey, start: int, stop: int) -> Iterator[tuple[int, Iterator[str]]]:
    """The documents that have characters in start..stop of the whole: where each ends in it, and those characters."""
    behind = 0  # where the file begins in the whole
    for file, length in zip(source.files, survey.characters, strict=True):
        begin, behind = behind, behind + length
        if begin < stop and behind > start:
            rows = ((len(row), iter((row,))) for row in file.read())
            for size, chunks in rows if file.in_rows else [(length, file.read())]:
                first, last = max(start - begin, 0), min(stop - begin, size)
                begin += size
                if first < last:
                    yield begin, _clipped(chunks, first, last)
                if begin >= stop:
                    break


def _clipped(chunks: Iterator[str], first: int, last: int) -> Iterator[str]:
    done = 0
    for chunk in chunks:
        yield chunk[max(first - done, 0) : max(last - done, 0)]
        done += len(chunk)
        if done >= last:
            return


def name_of(text: tuple[str, ...]) -> str:
    """A short name for what `text` names, fit for a folder: the first one's, without its ending."""
    if not text or text[0] in (SHAKESPEARE, *hub.TEXTS):
        return text[0] if text else SHAKESPEARE
    if "\0" in text[0]:
        raise UserError(f"{shown(text[0])}: {NO_PATH}")
    return "stdin" if text[0] == "-" else Path(text[0]).resolve().stem or "text"


def _files(word: str, spool: str, offline: bool, say: Callable[[str], None]) -> list[File]:
    if word == SHAKESPEARE:
        return [_shakespeare(offline)]
    if word == "-":
        return [_spooled("standard input", sys.stdin.buffer, Path(spool))]
    if not word:
        raise UserError("text: an empty name; give a file, a folder, or - for standard input")
    path = Path(word)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            found = folders.search(path)
            say(found.summary())
            return [_file(str(text), text) for text in found.texts]
        if stat.S_ISREG(mode):
            return [_file(word, path)]
        with open(path, "rb") as pipe:
            return [_spooled(word, pipe, Path(spool))]
    except FileNotFoundError:
        check_expanded(word)
        if "\n" in word:
            raise UserError(f"{shown(word)}: {NO_PATH}") from None
        if is_pattern(word):
            raise UserError(f"{word}: is a pattern that matches nothing; give the files, or their folder") from None
        hint = f"give a file, a folder, - for standard input, or a name ({', '.join((SHAKESPEARE, *hub.TEXTS))})"
        raise UserError(f"{word}: there is no such file; {hint}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{word!r}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _file(label: str, path: Path) -> File:
    info = path.stat()
    return File(label, path, info.st_size, info.st_mtime_ns)


def _shakespeare(offline: bool) -> File:
    path = storage.cache_folder() / "tinyshakespeare" / "input.txt"
    download.fetch(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256, "tiny Shakespeare", offline)
    return _file(SHAKESPEARE, path)


def _spooled(label: str, stream: IO[bytes], folder: Path) -> File:
    """A copy of a stream on disk, because a text is read more than once."""
    path = folder / f"{len(list(folder.iterdir()))}"
    try:
        with open(path, "wb") as file:
            shutil.copyfileobj(stream, file, CHUNK)
    except OSError as error:
        raise Failure(
            f"{label}: cannot be copied to {folder} ({error.strerror}); set TMPDIR to a larger place"
        ) from None
    return _file(label, path)


def _built_in(folder: Path) -> File:
    """The help topics of the Python language, about 470 KB, differing by version."""
    from pydoc_data.topics import topics

    path = folder / "topics"
    path.write_text("\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n", encoding="utf-8")
    return _file(BUILT_IN, path)
