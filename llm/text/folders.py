"""The texts below a folder: which files are read, and which are skipped because they are not the user's text."""

import codecs
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llm.errors import UserError
from llm.text import compressed, rows
from llm.text.conversion import converted_name, quote_name
from llm.text.recognise import HEAD

TEXT_SUFFIXES = tuple(suffix + packed for packed in ("", *compressed.SUFFIXES) for suffix in (".txt", ".md"))


SUFFIXES = (*TEXT_SUFFIXES, *rows.SUFFIXES)


ENVIRONMENT_FILES = {"pyvenv.cfg", "conda-meta"}  # a folder with one of these is a Python environment


INSTALLED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages"}


METADATA_SUFFIXES = (".egg-info", ".dist-info")  # of folders that describe an installed package


TOKEN_FILES = {"train.bin", "train-00000.bin"}


RUN_FILES = {"config.toml", "metrics.jsonl"}  # a folder with all of these is a run


RUN_TEXTS = {"metrics.jsonl", "samples.txt", "samples.jsonl"}


REPORT = b"<!-- losscurve report -->\n"  # the first line of a report in Markdown


LISTED = 3  # names in a list


DEAD_LINK = "a dead link"


NOT_A_TEXT = "not a text"


FolderId = tuple[int, int]  # device, inode


@dataclass
class Found:
    """The texts below `folder`, sorted by path, and descriptions of what is not read."""

    folder: Path
    texts: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    dead_links: list[str] = field(default_factory=list)
    others: dict[str, list[Path]] = field(default_factory=dict)  # files that no ending makes a text, by their ending

    def summary(self) -> str:
        """Return one line: how many texts are read, the first names, and what is not read."""
        names = [str(text.relative_to(self.folder)) for text in self.texts]
        noun = "text" if len(names) == 1 else "texts"
        return f"{self.folder}: reading {len(names):,} {noun}: {_list_first(names)}{self.describe_rest()}{self.hint()}"

    def describe_rest(self) -> str:
        """Return what is not read, "" if nothing."""
        lists = {"left out": self.left_out, "cannot be read": self.unreadable, "dead links": self.dead_links}
        return "".join(f"; {title}: {_list_first(names)}" for title, names in lists.items() if names)

    def hint(self) -> str:
        """Return how to read files of the commonest other ending that hold text; "" if they are fewer than the texts.

        So a folder of source code is not trained on by its README alone.
        """
        kinds = {suffix: files for suffix, files in self.others.items() if suffix and _is_text(min(files))}
        suffix = max(sorted(kinds), key=lambda kind: len(kinds[kind]), default="")
        if not suffix or len(kinds[suffix]) <= len(self.texts):
            return ""
        target = shlex.quote(f"{self.folder.resolve().name or 'all'}{suffix}.txt")
        return (
            f"; not read: {len(kinds[suffix]):,} {suffix}; to read them, join them: "
            f"find {quote_name(str(self.folder))} -name {shlex.quote('*' + suffix)} -exec cat {{}} + > {target}"
        )


def search(folder: Path) -> Found:
    """Find the texts below a folder. Hidden files and folders are left out and not listed.

    Linked folders are followed. Each folder is read once, so a loop of links ends.

    Raises:
        UserError: there is nothing to read.
    """
    found = Found(folder)
    for place, names in _walk(found):
        for name in sorted(names):
            _sort_file(found, place / name, names)
    found.texts.sort()
    if not found.texts:
        suffixes = ", ".join(suffix for suffix in SUFFIXES if not suffix.endswith(compressed.SUFFIXES))
        raise UserError(
            f"{folder}: no file that ends in {suffixes} in it "
            f"(text and lines also with {' or '.join(compressed.SUFFIXES)})"
            f"{found.describe_rest()}; name the files themselves{found.hint()}"
        )
    return found


def _sort_file(found: Found, path: Path, names: set[str]) -> None:
    """Add a file, among the `names` of its folder, to the list of `found` where it belongs."""
    label = _relative_name(path, found.folder)
    try:
        reason = _reason_to_skip(path, names, is_named_folder=path.parent == found.folder)
    except OSError as error:
        found.unreadable.append(f"{label} ({error.strerror})")
        return
    if reason is None:
        found.texts.append(path)
    elif reason == DEAD_LINK:
        found.dead_links.append(label)
    elif reason == NOT_A_TEXT:
        found.others.setdefault(path.suffix, []).append(path)
    else:
        found.left_out.append(f"{label} ({reason})")


def _walk(found: Found) -> Iterator[tuple[Path, set[str]]]:
    """Yield each folder with the names of its files, without hidden ones: real folders before linked ones."""
    root = found.folder
    pending = [root]
    seen: set[FolderId] = set()
    ids_above = {_folder_id(parent) for parent in root.resolve().parents}

    def add_unreadable(error: OSError) -> None:
        found.unreadable.append(f"{_relative_name(Path(error.filename), root)} ({error.strerror})")

    while pending:
        for place, folders, names in os.walk(pending.pop(0), onerror=add_unreadable):
            folder = Path(place)
            folder_id = _folder_id(folder)
            reason = ""
            if folder_id in ids_above:
                reason = "a link to a folder above"
            elif folder != root:
                reason = _reason_to_skip_folder(folder, {*folders, *names})
            if reason:
                found.left_out.append(f"{_relative_name(folder, root)}/ ({reason})")
            if reason or folder_id in seen:
                folders.clear()  # os.walk does not enter them
                continue
            seen.add(folder_id)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            pending += [folder / name for name in folders if (folder / name).is_symlink()]
            yield folder, {name for name in names if not name.startswith(".")}


def _reason_to_skip_folder(folder: Path, names: set[str]) -> str:
    """Return why nothing in a folder is the user's text, "" if something may be."""
    if names & ENVIRONMENT_FILES:
        return "an environment"
    if folder.name in INSTALLED_FOLDERS or folder.name.endswith(METADATA_SUFFIXES):
        return "installed packages"
    if names >= RUN_FILES:
        return "a run"
    return ""


def _reason_to_skip(path: Path, names: set[str], is_named_folder: bool) -> str | None:
    """Return why a file, among the `names` of its folder, is not read; None if it is read. Raises OSError.

    Beside token files, texts are read only in the folder that the user named.
    """
    name = path.name
    if path.is_symlink() and not path.exists():
        return DEAD_LINK
    if not name.lower().endswith(SUFFIXES):
        return NOT_A_TEXT
    if names & TOKEN_FILES and not is_named_folder:
        return "beside token files"
    if names >= RUN_FILES and name in RUN_TEXTS:
        return "of a run"
    other = _other_form(name, names)
    if other:
        return f"{other} is beside it"
    if not path.is_file():
        return "not a regular file"
    if name.lower().endswith(".md") and _is_report(path):
        return "a report"
    return None


def _other_form(name: str, names: set[str]) -> str:
    """Return the name of the same text converted or decompressed, "" if it is not among `names`."""
    others = [converted_name(name)]
    if name.lower().endswith(compressed.SUFFIXES):
        others.append(name.rpartition(".")[0])
    for other in others:
        if other != name and other in names:
            return other
    return ""


def _is_text(path: Path) -> bool:
    """Return whether a file begins with UTF-8 text. A pipe, which opening would wait for, is none."""
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except (OSError, UnicodeDecodeError):
        return False
    return bool(head) and b"\0" not in head


def _is_report(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(REPORT)) == REPORT


def _folder_id(path: Path) -> FolderId:
    info = path.stat()
    return info.st_dev, info.st_ino


def _relative_name(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path != folder else str(path)


def _list_first(names: list[str]) -> str:
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
