"""Durable files: complete or absent, hashed, verified. The project writes all its files through this package.

A file is written under a temporary name beside its place, flushed to the disk, and renamed over it; then the folder is
flushed too. After a crash at any moment the old file is complete or the new one is. A `transaction` replaces several
files together.

Some file systems lack locks, or cannot flush or rename folders. Work continues there with weaker guarantees; `limits`
reports which are missing.
"""

from llm.storage.files import (
    JSON_LIMIT,
    append,
    cache_folder,
    check_writable,
    flush,
    make_folder,
    read_facts,
    read_json,
    rename_folder,
    sha256,
    sync_folder,
    users_cache_folder,
    write_bytes,
    write_json,
    write_text,
    writing,
)
from llm.storage.filesystem_limits import (
    FILES_NOT_FLUSHED,
    FOLDERS_NOT_FLUSHED,
    NO_LOCKS,
    REMOVED_SLOWLY,
    UNSUPPORTED,
    limits,
    note,
)
from llm.storage.folders import (
    KEPT,
    READY,
    STAGING,
    folder_in_place,
    new_folder,
    recover,
    remove_folder,
    transaction,
    unfinished,
    verify_folder,
)
from llm.storage.locks import HELD, InUse, in_use, locked, sweep

__all__ = [
    "FILES_NOT_FLUSHED",
    "FOLDERS_NOT_FLUSHED",
    "HELD",
    "JSON_LIMIT",
    "KEPT",
    "NO_LOCKS",
    "READY",
    "REMOVED_SLOWLY",
    "STAGING",
    "UNSUPPORTED",
    "InUse",
    "append",
    "cache_folder",
    "check_writable",
    "flush",
    "folder_in_place",
    "in_use",
    "limits",
    "locked",
    "make_folder",
    "new_folder",
    "note",
    "read_facts",
    "read_json",
    "recover",
    "remove_folder",
    "rename_folder",
    "sha256",
    "sweep",
    "sync_folder",
    "transaction",
    "unfinished",
    "users_cache_folder",
    "verify_folder",
    "write_bytes",
    "write_json",
    "write_text",
    "writing",
]
