"""Where text comes from: a person's files, folders or standard input, a named text, the one Python carries."""

import codecs
import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from llm import download, storage
from llm.errors import Failure, UserError

SHAKESPEARE = "shakespeare"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
BUILT_IN = "pydoc topics"
SUFFIXES = (".txt", ".md")
CHUNK = 2**20  # bytes read at once


@dataclass(frozen=True)
class Document:
    """One text: `label` names it to a person, `path` is where its bytes are (perhaps a temporary file)."""

    label: str
    path: Path
    size: int  # bytes
    mtime_ns: int

    def read(self) -> Iterator[str]:
        """The text in pieces of bounded size, line ends as they are, without a byte-order mark at its start.

        Raises UserError if it cannot be read, or is not UTF-8 (saying at which byte).
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        done, first = 0, True
        try:
            with open(self.path, "rb") as file:
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
            place = done - waiting + error.start
            raise UserError(
                f"{self.label}: not UTF-8 at byte {place} ({error.reason}); "
                "save it as UTF-8, for example with iconv -f latin1 -t utf-8"
            ) from None
        except OSError as error:
            raise UserError(f"{self.label}: cannot be read ({error.strerror})") from None


@dataclass(frozen=True)
class Corpus:
    """Documents in their order. `missing` says why the text that was wanted is not what this is, or is empty."""

    name: str
    documents: list[Document]
    missing: str = ""

    def files(self) -> list[dict[str, Any]]:
        return [{"path": d.label, "size": d.size, "mtime_ns": d.mtime_ns} for d in self.documents]


@dataclass
class Survey:
    """What the first reading found."""

    characters: list[int] = field(default_factory=list)  # of each document
    bytes: int = 0
    sha256: str = ""  # of all documents' UTF-8, joined
    alphabet: set[str] = field(default_factory=set)

    @property
    def total(self) -> int:
        return sum(self.characters)


@contextmanager
def opened(text: tuple[str, ...], offline: bool = False) -> Iterator[Corpus]:
    """The corpus that `text` names: files, folders, `-` (standard input), 'shakespeare'; nothing is the default.

    The default is tiny Shakespeare, or the text that Python carries where that cannot be had. Standard input
    and pipes are copied to a temporary file that lives as long as the block. Raises UserError, and Failure
    for a named text that cannot be had.
    """
    with tempfile.TemporaryDirectory(prefix="losscurve-") as folder:
        if text:
            documents = [document for word in text for document in _documents(word, Path(folder), offline)]
            yield Corpus(name_of(text), documents)
            return
        try:
            corpus = Corpus(SHAKESPEARE, [_shakespeare(offline)])
        except Failure as failure:
            corpus = Corpus(BUILT_IN, [_built_in(Path(folder))], str(failure))
        yield corpus


def look(source: Corpus, alphabet: bool = False) -> Survey:
    """The first reading: counts, the hash, and on demand the distinct characters. UserError if it is not UTF-8."""
    survey, digest = Survey(), hashlib.sha256()
    for document in source.documents:
        survey.characters.append(0)
        for chunk in document.read():
            content = chunk.encode("utf-8")
            digest.update(content)
            survey.bytes += len(content)
            survey.characters[-1] += len(chunk)
            if alphabet:
                survey.alphabet.update(chunk)
    survey.sha256 = digest.hexdigest()
    return survey


def span(source: Corpus, survey: Survey, start: int, stop: int) -> Iterator[tuple[int, Iterator[str]]]:
    """The documents that have characters in start..stop of the whole, each as its number and those characters."""
    begin = 0
    for number, (document, length) in enumerate(zip(source.documents, survey.characters, strict=True)):
        first, last = max(start - begin, 0), min(stop - begin, length)
        begin += length
        if first < last:
            yield number, _clipped(document.read(), first, last)


def _clipped(chunks: Iterator[str], first: int, last: int) -> Iterator[str]:
    done = 0
    for chunk in chunks:
        yield chunk[max(first - done, 0) : max(last - done, 0)]
        done += len(chunk)
        if done >= last:
            return


def name_of(text: tuple[str, ...]) -> str:
    """A short name for what `text` names, fit for a folder: the first one's, without its ending."""
    if not text or text[0] == SHAKESPEARE:
        return SHAKESPEARE
    return "stdin" if text[0] == "-" else Path(text[0]).resolve().stem or "text"


def _documents(word: str, spool: Path, offline: bool) -> list[Document]:
    if word == SHAKESPEARE:
        return [_shakespeare(offline)]
    if word == "-":
        return [_spooled("standard input", sys.stdin.buffer, spool)]
    if not word:
        raise UserError("text: an empty name; give a file, a folder, or - for standard input")
    path = Path(word)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return [_document(str(found), found) for found in _search(path)]
        if stat.S_ISREG(mode):
            return [_document(word, path)]
        with open(path, "rb") as pipe:
            return [_spooled(word, pipe, spool)]
    except FileNotFoundError:
        hint = f"give a file, a folder, - for standard input, or the name {SHAKESPEARE}"
        raise UserError(f"{word}: there is no such file; {hint}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{word!r}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _search(folder: Path) -> list[Path]:
    """The texts below a folder, sorted by path; hidden files and folders are left out."""
    found = []
    for where, names, files in os.walk(folder):
        names[:] = [name for name in names if not name.startswith(".")]
        found += [Path(where, name) for name in files if name.lower().endswith(SUFFIXES) and name[0] != "."]
    if not found:
        raise UserError(f"{folder}: no {' or '.join(SUFFIXES)} file in it; name the files themselves")
    return sorted(path for path in found if path.is_file())


def _document(label: str, path: Path) -> Document:
    info = path.stat()
    return Document(label, path, info.st_size, info.st_mtime_ns)


def _shakespeare(offline: bool) -> Document:
    path = storage.cache_folder() / "tinyshakespeare" / "input.txt"
    download.fetch(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256, "tiny Shakespeare", offline)
    return _document(SHAKESPEARE, path)


def _spooled(label: str, stream: IO[bytes], folder: Path) -> Document:
    """A copy of a stream on disk, because a text is read more than once."""
    path = folder / f"{len(list(folder.iterdir()))}"
    try:
        with open(path, "wb") as file:
            shutil.copyfileobj(stream, file, CHUNK)
    except OSError as error:
        raise Failure(
            f"{label}: cannot be copied to {folder} ({error.strerror}); set TMPDIR to a larger place"
        ) from None
    return _document(label, path)


def _built_in(folder: Path) -> Document:
    """The help topics of the Python language, about 470 KB, differing by version."""
    from pydoc_data.topics import topics

    path = folder / "topics"
    path.write_text("\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n", encoding="utf-8")
    return _document(BUILT_IN, path)
