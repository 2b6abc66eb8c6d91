"""A corpus: the user's files, folders or standard input, a named text, or the text that comes with Python.

A document is a file, or a row of a file of rows. Rows are never listed in memory, as there may be millions.
"""

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
from llm.config import NO_PATH, check_expanded, is_pattern, short_repr
from llm.errors import Failure, UserError
from llm.storage import download
from llm.text import folders, hub, rows
from llm.text.oddities import Oddities, rows_command
from llm.text.text_file import CHUNK, File

SHAKESPEARE = "shakespeare"


SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


BUILT_IN = "pydoc topics"


ROW_END = b"\xff"  # ends a row in the hash of a text; UTF-8 never contains this byte


NAMED_TEXTS = (SHAKESPEARE, *hub.TEXTS)


Say = Callable[[str], None]  # shows the user a line


@dataclass(frozen=True)
class Corpus:
    """Files in their order. `missing` says why another text replaces the default one, "" if none does."""

    name: str
    files: list[File]
    missing: str = ""

    def stamps(self) -> list[dict[str, Any]]:
        """Return path, size and time of each file: equal stamps mean unchanged files, without reading them."""
        return [{"path": file.label, "size": file.size, "mtime_ns": file.mtime_ns} for file in self.files]


@dataclass
class Survey:
    """What the first pass over a corpus found."""

    characters: list[int] = field(default_factory=list)  # of each file
    documents: int = 0  # without empty ones
    bytes: int = 0  # in UTF-8
    sha256: str = ""  # of the UTF-8 of all documents, joined, with ROW_END after each row: its end becomes a token
    alphabet: set[str] = field(default_factory=set)
    notices: list[str] = field(default_factory=list)  # a line for each kind of thing that the user may not expect

    @property
    def total(self) -> int:
        """The number of characters."""
        return sum(self.characters)


@contextmanager
def opened(
    text: tuple[str, ...],
    offline: bool = False,
    limit: int | None = None,
    say: Say = lambda line: None,
    text_field: str | None = None,
) -> Iterator[Corpus]:
    """Yield the corpus that `text` names: files, folders, `-` (standard input), named texts; () is the default.

    The default is tiny Shakespeare, or the text that comes with Python if tiny Shakespeare is not available. Of a
    text from the hub, the first `limit` characters are read. `text_field` is the field or column of rows that
    holds their text. Standard input and pipes are copied to a temporary file, which is removed when the block
    ends. `say` gets a line about what a search of folders read and left out.

    Raises:
        UserError: a text is not there, or cannot be read.
        Failure: a named text cannot be downloaded.
    """
    with tempfile.TemporaryDirectory(prefix="losscurve-") as folder:
        if text:
            files = [file for word in text for file in _find_files(word, Path(folder), offline, limit, say, text_field)]
            _check_field_is_used(files, text_field)
            yield Corpus(name_of(text), files)
        else:
            yield _open_default(Path(folder), offline)


def _open_default(folder: Path, offline: bool) -> Corpus:
    try:
        return Corpus(SHAKESPEARE, [_shakespeare(offline)])
    except Failure as failure:
        return Corpus(BUILT_IN, [_built_in(folder)], missing=str(failure))


def _check_field_is_used(files: list[File], text_field: str | None) -> None:
    if text_field in (None, rows.FIELD):
        return
    if any(file.in_rows and file.field == text_field for file in files):
        return
    refusal = f"text_field = {text_field!r}: is for rows of {', '.join(rows.SUFFIXES)}, and there are none"
    for file in files:
        if command := rows_command(file.label, file.shell_name):
            raise UserError(f"{refusal}; to write those of {file.label}: {command}")
    raise UserError(f"{refusal}; leave it out")


def look(source: Corpus, alphabet: bool = False) -> Survey:
    """Read a corpus once and return its counts and hash, and with `alphabet` its distinct characters.

    Raises:
        UserError: a file cannot be read, or is not UTF-8.
    """
    survey = Survey()
    digest = hashlib.sha256()
    oddities = Oddities()
    for file in source.files:
        oddities.begin(file.label, file.shell_name, file.in_rows)
        characters = 0
        for piece in file.read():
            content = piece.encode("utf-8")
            digest.update(content)
            oddities.add(piece)
            characters += len(piece)
            survey.bytes += len(content)
            if file.in_rows and piece:
                survey.documents += 1
                digest.update(ROW_END)
            if alphabet:
                survey.alphabet.update(piece)
        if not file.in_rows and characters > 0:
            survey.documents += 1
        survey.characters.append(characters)
    survey.sha256 = digest.hexdigest()
    survey.notices = list(oddities.notices())
    return survey


def documents_between(source: Corpus, survey: Survey, start: int, stop: int) -> Iterator[tuple[int, Iterator[str]]]:
    """Yield each document that has characters in start..stop of the corpus: (where it ends, those characters)."""
    file_end = 0
    for file, file_size in zip(source.files, survey.characters, strict=True):
        begin = file_end
        file_end += file_size
        if begin >= stop or file_end <= start:
            continue
        for size, pieces in _read_documents(file, file_size):
            first = max(start - begin, 0)
            last = min(stop - begin, size)
            begin += size
            if first < last:
                yield begin, _clip(pieces, first, last)
            if begin >= stop:
                break


def _read_documents(file: File, file_size: int) -> Iterator[tuple[int, Iterator[str]]]:
    """Yield the size of each document of a file, in characters, and its text in pieces."""
    if not file.in_rows:
        yield file_size, file.read()
        return
    for row in file.read():
        yield len(row), iter([row])


def _clip(pieces: Iterator[str], first: int, last: int) -> Iterator[str]:
    """Yield the characters first..last of a document."""
    done = 0
    for piece in pieces:
        yield piece[max(first - done, 0) : max(last - done, 0)]
        done += len(piece)
        if done >= last:
            return


def name_of(text: tuple[str, ...]) -> str:
    """Return a short name for `text` that suits a folder: that of its first file, without suffix."""
    if not text:
        return SHAKESPEARE
    first = text[0]
    if first in NAMED_TEXTS:
        return first
    if "\0" in first:
        raise UserError(f"{short_repr(first)}: {NO_PATH}")
    if first == "-":
        return "stdin"
    return Path(first).resolve().stem or "text"


def _find_files(
    word: str, temporary: Path, offline: bool, limit: int | None, say: Say, text_field: str | None
) -> list[File]:
    """Return the files that one word of `text` names; only the user's own files have another field than usual."""
    if word in hub.TEXTS:
        return [_file(word, hub.fetch(word, limit, offline, say))]
    if word == SHAKESPEARE:
        return [_shakespeare(offline)]
    if word == "-":
        files = [_copy_stream("standard input", sys.stdin.buffer, temporary)]
    elif not word:
        raise UserError("text: an empty name; give a file, a folder, or - for standard input")
    else:
        files = _find_path(word, temporary, say)
    return [replace(file, field=text_field or rows.FIELD) for file in files]


def _find_path(word: str, temporary: Path, say: Say) -> list[File]:
    """Return a file, the files below a folder, or a copy of a pipe."""
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
            return [_copy_stream(word, pipe, temporary)]
    except FileNotFoundError:
        raise _not_found(word) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{word!r}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _not_found(word: str) -> UserError:
    """Return the error for a name that no file has. Raises UserError for a pattern that no shell expanded."""
    check_expanded(word)
    if "\n" in word:
        return UserError(f"{short_repr(word)}: {NO_PATH}")
    if is_pattern(word):
        return UserError(f"{word}: is a pattern that matches nothing; give the files, or their folder")
    names = ", ".join(NAMED_TEXTS)
    return UserError(f"{word}: there is no such file; give a file, a folder, - for standard input, or a name ({names})")


def _file(label: str, path: Path) -> File:
    info = path.stat()
    return File(label, path, info.st_size, info.st_mtime_ns)


def _shakespeare(offline: bool) -> File:
    path = storage.cache_folder() / "tinyshakespeare" / "input.txt"
    download.fetch(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256, "tiny Shakespeare", offline)
    return _file(SHAKESPEARE, path)


def _copy_stream(label: str, stream: IO[bytes], folder: Path) -> File:
    """Copy a stream to a file, because a text is read more than once."""
    number = len(list(folder.iterdir()))
    path = folder / str(number)
    try:
        with open(path, "wb") as file:
            shutil.copyfileobj(stream, file, CHUNK)
    except OSError as error:
        raise Failure(
            f"{label}: cannot be copied to {folder} ({error.strerror}); set TMPDIR to a folder with more space"
        ) from None
    return _file(label, path)


def _built_in(folder: Path) -> File:
    """Write the help topics of the Python language to a file: about 470 KB, differing by version."""
    from pydoc_data.topics import topics

    path = folder / "topics"
    path.write_text("\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n", encoding="utf-8")
    return _file(BUILT_IN, path)
