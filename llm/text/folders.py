"""The texts below a folder: what is read, and what is left out because it is not a person's text."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llm.errors import UserError
from llm.text import compressed, rows
from llm.text.recognise import converted

PLAIN = tuple(ending + packed for packed in ("", *compressed.SUFFIXES) for ending in (".txt", ".md"))


SUFFIXES = (*PLAIN, *rows.SUFFIXES)


ENVIRONMENT = {"pyvenv.cfg", "conda-meta"}  # a folder with one of these is an environment of Python


INSTALLED = {"__pycache__", "node_modules", "site-packages", "dist-packages"}


METADATA = (".egg-info", ".dist-info")  # endings of the folders that describe an installed package


TOKENS = {"train.bin", "train-00000.bin"}


RUN = {"config.toml", "metrics.jsonl"}


OF_A_RUN = {"metrics.jsonl", "samples.txt", "samples.jsonl"}


REPORT = b"<!-- losscurve report -->\n"  # the first line of a report in Markdown


SHOWN = 3  # names in a list


DEAD = "a dead link"


Key = tuple[int, int]


@dataclass
class Found:
    """The texts below `folder`, sorted by path, and in words what was left out."""

    folder: Path
    texts: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    dead_links: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """A line: how many texts are read, the first names, and what is not read."""
        names = [str(text.relative_to(self.folder)) for text in self.texts]
        return f"{self.folder}: reading {_counted(names, 'text')}{self.rest()}"

    def rest(self) -> str:
        """What is not read, in words."""
        lists = {"left out": self.left_out, "cannot be read": self.unreadable, "dead links": self.dead_links}
        return "".join(f"; {title}: {_listed(names)}" for title, names in lists.items() if names)


def search(folder: Path) -> Found:
    """Find the texts below a folder. Hidden files and folders are left out without a word.

    A linked folder is followed, each folder read once: what links make loops of ends. Raises UserError if there is
    nothing to read.
    """
    found = Found(folder)
    for where, names in _folders(found):
        is_run, has_tokens = names >= RUN, bool(names & TOKENS) and where != folder
        for name in sorted(names):
            path = where / name
            try:
                reason = _passed_over(path, names, is_run, has_tokens)
            except OSError as error:
                found.unreadable.append(f"{_shown(path, folder)} ({error.strerror})")
                continue
            if reason is None:
                found.texts.append(path)
            elif reason == DEAD:
                found.dead_links.append(_shown(path, folder))
            elif reason:
                found.left_out.append(f"{_shown(path, folder)} ({reason})")
    found.texts.sort()
    if not found.texts:
        plain, packed = [s for s in SUFFIXES if not s.endswith(compressed.SUFFIXES)], " or ".join(compressed.SUFFIXES)
        raise UserError(
            f"{folder}: no file that ends in {', '.join(plain)} in it (text and lines also with {packed})"
            f"{found.rest()}; name the files themselves"
        )
    return found


def _folders(found: Found) -> Iterator[tuple[Path, set[str]]]:
    """Yield each folder with the names of its files, hidden ones left out: real folders before linked ones."""
    waiting = [found.folder]
    seen: set[Key] = set()  # by device and inode
    above = {_key(parent) for parent in found.folder.resolve().parents}

    def refused(error: OSError) -> None:
        found.unreadable.append(f"{_shown(Path(error.filename), found.folder)} ({error.strerror})")

    while waiting:
        for place, folders, names in os.walk(waiting.pop(0), onerror=refused):
            where = Path(place)
            key = _key(where)
            reason = "" if where == found.folder else _no_texts(where, {*folders, *names})
            if key in above:
                reason = "a link to a folder above"
            if key in seen or reason:
                folders.clear()
                if reason:
                    found.left_out.append(f"{_shown(where, found.folder)}/ ({reason})")
                continue
            seen.add(key)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            waiting += [where / name for name in folders if (where / name).is_symlink()]
            yield where, {name for name in names if not name.startswith(".")}


def _no_texts(where: Path, names: set[str]) -> str:
    """Why nothing in a folder is a person's text; "" if it may be."""
    if names & ENVIRONMENT:
        return "an environment"
    if where.name in INSTALLED or where.name.endswith(METADATA):
        return "installed packages"
    return "a run" if names >= RUN else ""


def _passed_over(path: Path, names: set[str], is_run: bool, has_tokens: bool) -> str | None:
    """Why a file among `names` is not read: None if it is, "" for what does not look like a text. Raises OSError."""
    name = path.name
    if path.is_symlink() and not path.exists():
        return DEAD
    if not name.lower().endswith(SUFFIXES):
        return ""
    if has_tokens:
        return "beside token files"
    if is_run and name in OF_A_RUN:
        return "of a run"
    packed = name.lower().endswith(compressed.SUFFIXES)
    for other in (converted(name), name.rpartition(".")[0] if packed else name):
        if other != name and other in names:
            return f"{other} is beside it"
    if not path.is_file():
        return "no file"
    if name.lower().endswith(".md"):
        with open(path, "rb") as file:
            if file.read(len(REPORT)) == REPORT:
                return "a report"
    return None


def _key(path: Path) -> Key:
    info = path.stat()
    return info.st_dev, info.st_ino


def _shown(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path != folder else str(path)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _counted(names: list[str], what: str) -> str:
    return f"{len(names):,} {what}{'s' if len(names) != 1 else ''}: {_listed(names)}"
