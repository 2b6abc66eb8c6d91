"""Files that gzip or Zstandard compressed, read as the bytes that are in them."""

import gzip
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from llm.errors import UserError
from llm.text.recognise import quoted

SUFFIXES = (".gz", ".zst")


MAGIC = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}


@contextmanager
def opened(path: Path, label: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Yield (the bytes of a file, decompressed where its name ends in .gz or .zst; the file on the disk).

    Raises UserError, also for what goes wrong in reading them: a file that is cut short among others.
    """
    broken: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    try:
        with open(path, "rb") as raw:
            suffix = path.suffix.lower()
            if suffix not in SUFFIXES:
                yield raw, raw
                return
            head = raw.read(4)
            raw.seek(0)
            if head and not head.startswith(MAGIC[suffix]):
                raise UserError(
                    f"{label}: its name ends in {suffix}, but it is not compressed so; rename it: "
                    f"mv -n {quoted(str(path))} {quoted(str(path.with_suffix('')))}"
                )
            if suffix == ".gz":
                with gzip.open(raw) as unpacked:
                    yield cast(IO[bytes], unpacked), raw
                return
            zstd = _zstd(label)
            broken += (zstd.ZstdError,)
            with zstd.open(raw) as file:
                yield file, raw
    except broken as error:
        cause = getattr(error, "strerror", None) or error
        damaged = "; it is damaged or was cut off, so get it again" if not getattr(error, "strerror", None) else ""
        raise UserError(f"{label}: cannot be read ({cause}){damaged}") from None


def _zstd(label: str) -> Any:
    """The standard library's module of Python 3.14, or its backport. The package zstandard ends a file that is cut
    short without an error.
    """
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise UserError(f"{label}: Zstandard needs a package; install it with: pip install backports.zstd") from None
    return zstd
