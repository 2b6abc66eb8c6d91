"""Folders and groups of files that are put in place together or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm.errors import UserError
from llm.storage.files import (
    make_folder,
    read_json,
    rename_folder,
    sha256,
    sync_file,
    sync_files,
    sync_folder,
    temporary_path,
    write_json,
)
from llm.storage.filesystem_limits import REMOVED_SLOWLY, note
from llm.storage.locks import locked, sweep

STAGING = ".preparing"  # a transaction before its commit

READY = ".prepared"  # a transaction after its commit, while its files are moved into place

KEPT = ".partial"  # the staging folder of a long transaction, which an interruption does not remove


@contextmanager
def folder_in_place(final: Path) -> Iterator[Path]:
    """Yield a new folder that is renamed to `final` only once it is complete; its `manifest.json` is written last.

    The manifest holds the size and SHA-256 of every file, so that `verify_folder` can tell whether the folder is
    unchanged. An existing folder of that name is set aside until the new one is in place.
    """
    make_folder(final.parent)
    temporary = temporary_path(final, "tmp")
    aside = temporary_path(final, "old")
    if aside.exists() and not final.exists():  # an earlier attempt failed and could not undo its rename
        os.replace(aside, final)
    for leftover in (temporary, aside):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        manifest = {}
        for path in sorted(temporary.iterdir()):
            with open(path, "rb") as file:
                sync_file(file)
            manifest[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
        write_json(temporary / "manifest.json", {"files": manifest})
        if final.exists():
            _free_name(final, aside)
        os.replace(temporary, final)
    except BaseException:
        if aside.exists() and not final.exists():
            aside.rename(final)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `final` that is renamed to it when the block ends: until then `final` is untouched.

    The block flushes what it writes. The hidden folder, `.NAME.new`, is locked. What a crash leaves of it, the next
    call for the same `final` removes.

    Raises: InUse if another process makes this folder; UserError if `final` has files by the end.
    """
    final = final.resolve()
    hidden = final.with_name(f".{final.name}.new")
    with locked(hidden, "this new folder"):
        for path in hidden.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()
        try:
            yield hidden
            sync_folder(hidden)
            os.replace(hidden, final)
        except BaseException as error:
            shutil.rmtree(hidden, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise UserError(f"{final}: another process wrote to it; choose another folder") from None
            raise
    sync_folder(final.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder; a crash leaves it complete, or frees its name (`sweep` removes the rest).

    Where the file system cannot rename the folder, a crash may leave a part of it, which does not verify. A folder of
    this name that `folder_in_place` is about to put there stays.
    """
    temporary = temporary_path(folder.with_name(f"{folder.name}-removed"), "tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    _free_name(folder, temporary)
    sync_folder(folder.parent)
    if temporary.exists():
        shutil.rmtree(temporary)


def _free_name(folder: Path, aside: Path) -> None:
    """Rename `folder` to `aside`, or remove it where the file system cannot rename it.

    An overlay, which containers use, cannot rename a folder of its lower layer. A folder that is half removed there
    does not verify.
    """
    try:
        os.replace(folder, aside)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        note(folder, REMOVED_SLOWLY, error)
        shutil.rmtree(folder)


def verify_folder(folder: Path) -> None:
    """Compare every file of `folder` with its manifest. Hidden files, which file managers leave, may be beside them.

    Raises: UserError that names the first file which is missing, added or changed since it was written.
    """
    if (folder / "manifest.json").is_symlink():
        raise UserError(f"{folder / 'manifest.json'}: not a regular file")
    manifest = read_json(folder / "manifest.json")
    entries = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{folder / 'manifest.json'}: lists no files")
    present = {path.name for path in folder.iterdir()} - {"manifest.json"}
    visible = {name for name in present if not name.startswith(".")}
    for name in sorted(visible | set(entries)):
        path = folder / name
        entry = entries.get(name)
        if name != Path(name).name or name not in present or not isinstance(entry, dict):
            raise UserError(f"{path}: {'not in the manifest' if name in present else 'missing'}")
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{path}: not a regular file")
        if path.stat().st_size != entry.get("size") or sha256(path) != entry.get("sha256"):
            raise UserError(f"{path}: changed since it was written (SHA-256 differs)")


@contextmanager
def transaction(folder: Path, keep: bool = False) -> Iterator[Path]:
    """Yield a staging folder; when the block ends, replace the files of `folder` by those in it, all or none.

    Until then `folder` is untouched. The commit is a rename of the staging folder, after which its files are moved into
    place. `recover` completes or undoes what a crash interrupted. With `keep`, an interrupted block leaves its files,
    and the next one finds them in its staging folder.
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
        sync_files(staging)
        sync_folder(staging)
        rename_folder(staging, folder / READY)
    except BaseException:
        if not keep:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_folder(folder)
    recover(folder)


def recover(folder: Path) -> None:
    """Complete an interrupted `transaction` of `folder` if it had committed, else undo it.

    Where another process might be writing to the folder, the caller holds its lock: see `unfinished`.
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
    """Return whether a `transaction` of `folder` is running or was interrupted: lock the folder, then `recover`."""
    return (folder / STAGING).exists() or (folder / READY).exists()
