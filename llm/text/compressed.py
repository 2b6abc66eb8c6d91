"""Files compressed by gzip or Zstandard, read as the bytes that they contain."""

import gzip
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from llm.errors import UserError
from llm.text.conversion import quote_name

SUFFIXES = (".gz", ".zst")


SIGNATURES: dict[str, tuple[bytes, ...]] = {
    ".gz": (b"\x1f\x8b",),
    # a frame, or one that is skipped, which pzstd puts first (RFC 8878, section 3.1)
    ".zst": (b"\x28\xb5\x2f\xfd", *(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60))),
}


@contextmanager
def open_decompressed(path: Path, label: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Yield (the file decompressed if its name ends in .gz or .zst, the raw file on disk).

    `label` is the name of the file in messages.

    Raises:
        UserError: the file cannot be opened, or an error occurs while the block reads it: among others, the
            compressed data is truncated.
    """
    read_errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    try:
        with open(path, "rb") as raw:
            suffix = path.suffix.lower()
            if suffix not in SUFFIXES:
                yield raw, raw
                return
            _check_signature(raw, path, label)
            if suffix == ".gz":
                with gzip.open(raw) as unpacked:
                    yield cast(IO[bytes], unpacked), raw
                return
            zstd = _import_zstd(label)
            read_errors = (*read_errors, zstd.ZstdError)
            with zstd.open(raw) as file:
                yield file, raw
    except read_errors as error:
        cause = getattr(error, "strerror", None)
        if cause:
            raise UserError(f"{label}: cannot be read ({cause})") from None
        raise UserError(
            f"{label}: cannot be read ({error}); it is damaged or was cut off, so download or copy it again"
        ) from None


def _check_signature(raw: IO[bytes], path: Path, label: str) -> None:
    head = raw.read(4)
    raw.seek(0)
    suffix = path.suffix.lower()
    if head and not head.startswith(SIGNATURES[suffix]):
        raise UserError(
            f"{label}: its name ends in {suffix}, but its content is not in that format; rename it: "
            f"mv -n {quote_name(str(path))} {quote_name(str(path.with_suffix('')))}"
        )


def _import_zstd(label: str) -> Any:
    """Import the standard library's module of Python 3.14, or its backport.

    The package zstandard is not used: it reads a truncated file without an error.
    """
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise UserError(
            f"{label}: Zstandard needs the backports.zstd package; install it with: pip install backports.zstd"
        ) from None
    return zstd
