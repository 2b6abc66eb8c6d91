"""Folders and groups of files that take their place together or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm.errors import UserError
from llm.storage.files import (
    _beside,
    _sync_file,
    _sync_files,
    make_folder,
    read_json,
    rename_folder,
    sha256,
    sync_folder,
    write_json,
)
from llm.storage.lacking import REMOVED_SLOWLY, note
from llm.storage.locks import sweep

STAGING, READY = ".preparing", ".prepared"  # a transaction before and after its point of no return


KEPT = ".partial"  # the staging of a long one, which is kept when it is interrupted


@contextmanager
def folder_in_place(final: Path) -> Iterator[Path]:
    """A new folder that takes the name `final` only when it is complete, with `manifest.json` last.

    The manifest holds the size and SHA-256 of every file, so that `verify_folder` can tell whether
    the folder is still what was written. A folder of that name is set aside until the new one stands.
    """
    make_folder(final.parent)
    temporary, aside = _beside(final, "tmp"), _beside(final, "old")
    if aside.exists() and not final.exists():  # of an attempt that could not even be undone
        os.replace(aside, final)
    for left in (temporary, aside):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        manifest = {}
        for path in sorted(temporary.iterdir()):
            with open(path, "rb") as file:
                _sync_file(file)
            manifest[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
        write_json(temporary / "manifest.json", {"files": manifest})
        if final.exists():
            _free(final, aside)
        os.replace(temporary, final)
    except BaseException:
        if aside.exists() and not final.exists():
            aside.rename(final)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder; after a crash at any moment it is there, whole, or its name is gone (see `sweep`).

    Where the file system cannot rename it, a part may be there, which does not verify.
    """
    temporary = _beside(folder, "tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    _free(folder, temporary)
    sync_folder(folder.parent)
    if temporary.exists():
        shutil.rmtree(temporary)


def _free(folder: Path, aside: Path) -> None:
    """Free the name of a folder: rename it to `aside`, or remove it where the file system cannot rename it.

    An overlay, as containers have, renames no folder of its lower layer. What is half removed there does not verify.
    """
    try:
        os.replace(folder, aside)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        note(folder, REMOVED_SLOWLY, error)
        shutil.rmtree(folder)


def verify_folder(folder: Path) -> None:
    """Raises UserError naming the first file that is missing, added or changed since it was written."""
    if (folder / "manifest.json").is_symlink():
        raise UserError(f"{folder / 'manifest.json'}: not a regular file")
    manifest = read_json(folder / "manifest.json")
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not files:
        raise UserError(f"{folder / 'manifest.json'}: lists no files")
    present = {path.name for path in folder.iterdir()} - {"manifest.json"}
    for name in sorted(present | set(files)):
        path, entry = folder / name, files.get(name)
        if name != Path(name).name or name not in present or not isinstance(entry, dict):
            raise UserError(f"{path}: {'not in the manifest' if name in present else 'missing'}")
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{path}: not a regular file")
        if path.stat().st_size != entry.get("size") or sha256(path) != entry.get("sha256"):
            raise UserError(f"{path}: changed since it was written (SHA-256 differs)")


@contextmanager
def transaction(folder: Path, keep: bool = False) -> Iterator[Path]:
    """Replace several files of `folder` together: write the new ones into the path this yields.

    Until the block ends, `folder` is untouched. Then the staging folder is renamed, the point of no
    return, and its files are moved into place. `recover` finishes or undoes what a crash left.
    With `keep`, what an interrupted block has written stays, and the next one finds it in its path.
    """
    make_folder(folder)
    recover(folder)
    staging = folder / (KEPT if keep else STAGING)
    if keep:
        make_folder(staging)
        sweep(staging)
    else:
        staging.mkdir()
    try:
        yield staging
        _sync_files(staging)
        sync_folder(staging)
        rename_folder(staging, folder / READY)
    except BaseException:
        if not keep:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_folder(folder)
    recover(folder)


def recover(folder: Path) -> None:
    """Roll an interrupted `transaction` of `folder` forward if it was complete, else undo it.

    The caller holds the folder's lock where another process might be preparing it: see `unfinished`.
    """
    if (folder / STAGING).exists():
        shutil.rmtree(folder / STAGING)
    ready = folder / READY
    if ready.exists():
        for path in sorted(ready.iterdir()):
            os.replace(path, folder / path.name)
        sync_folder(folder)
        ready.rmdir()
        sync_folder(folder)


def unfinished(folder: Path) -> bool:
    """Whether a `transaction` of `folder` is under way or was interrupted: lock it, then `recover`."""
    return (folder / STAGING).exists() or (folder / READY).exists()
