"""Token files of other programs: their format is recognised by their content, and named instead of guessed silently.

A `train.bin` without a `meta.json` is read as bare little-endian uint16 ids, nanoGPT's format. Ids in other formats are
refused with a command that converts them: many of them would train without an error if read as uint16. nanoGPT's
character data has its alphabet beside it, in `meta.pkl`. That is a pickle, so it is read only if it is plain data and
cannot run code.
"""

import io
import pickle
import pickletools
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm.errors import UserError
from llm.tokens.tokenizer import Characters

HEAD = 2**20  # bytes from which a format is recognised


FEW = 256  # bytes: fewer show no pattern


LARGEST = 2**18  # every vocabulary of today is smaller; ids read in a wrong format soon are not


# llm.c's header is 256 int32; the first is a magic number that says which ids follow
LLM_C = {20240520: ("<u2", "GPT-2's ids"), 20240801: ("<u4", "Llama 3's ids")}


LLM_C_HEADER = 1024  # bytes


WIDE_FORMATS = {  # in the order in which they are tried
    "<f8": "float64",
    "<f4": "float32",
    "<i8": "int64",
    ">i8": "big-endian int64",
    "<u4": "uint32",
    ">u4": "big-endian uint32",
}


SIGNATURES = {
    b"<!DOCTYPE html>\n<!-- losscurve ": ("a page that losscurve wrote", "open it in a browser"),
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "download the file with: git lfs pull"),
    b"\x1f\x8b\x08": ("a gzip file", "unpack it first, with gunzip"),
    b"\x28\xb5\x2f\xfd": ("a Zstandard file", "unpack it first, with unzstd"),
    b"\xfd7zXZ\0": ("an xz file", "unpack it first, with unxz"),
    b"BZh": ("a bzip2 file", "unpack it first, with bunzip2"),
    b"PK\3\4": ("a zip archive", "unpack it first, and give the file in it"),
}


META_LIMIT = 2**22  # bytes of a meta.pkl; nanoGPT's would have a quarter of that for all of Unicode


# The instructions of a pickle that make dicts, lists, texts and numbers. None of them imports or calls anything.
PLAIN_INSTRUCTIONS = {
    *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BININT", "BININT1", "BININT2"),
}


@dataclass(frozen=True)
class Format:
    """A format of ids other than bare little-endian uint16, and how NumPy reads it."""

    description: str
    dtype: str
    offset: int = 0  # bytes before the first id


BARE_UINT16 = Format("", "<u2")


def signature(head: bytes) -> tuple[str, str] | None:
    """Return what a file is by its first bytes, and the remedy; None if it may be a file of numbers."""
    for magic, found in SIGNATURES.items():
        if head.startswith(magic):
            return found
    start = head[:1000].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page", "download the file itself, not the page that shows it"
    return None


def is_text(head: bytes) -> bool:
    """Whether these are the first bytes of a text, in UTF-8 or in an older encoding that extends ASCII."""
    if len(head) < 16 or b"\0" in head:
        return False
    values = np.frombuffer(head, np.uint8)
    if np.mean((values >= 32) & (values < 127)) > 0.75:
        return True
    text = head.decode("utf-8", errors="ignore")
    is_utf8 = len(head) - len(text.encode("utf-8")) < 4  # the last character may be incomplete
    return is_utf8 and not any(ord(character) < 32 and character not in "\t\n\r\f" for character in text)


def check_format(path: Path) -> None:
    """Check that the token file at `path` can be bare uint16 ids.

    A file that cannot be opened is left to the caller, who opens it next.

    Raises:
        UserError: names the format of the file, and the remedy.
    """
    try:
        head = _read_head(path)
    except OSError:
        return
    if found := signature(head):
        description, remedy = found
        raise UserError(f"{path}: is {description}; {remedy}")
    if is_text(head):
        raise UserError(
            f"{path}: is a text, not token ids; train on it with: losscurve train --text {shlex.quote(str(path))}"
        )
    if other := _detect_format(path):
        raise UserError(
            f"{path}: {other.description}, and without a meta.json only bare uint16 ids are read; "
            f"{_conversion_remedy(path.parent)}"
        )


def _read_head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def _detect_format(path: Path) -> Format | None:
    """Return the format of a file of numbers; None if it is bare uint16 ids or cannot be distinguished from them."""
    head = _read_head(path)
    if head.startswith(b"\x93NUMPY"):
        return _numpy_format(path)
    if len(head) < FEW:
        return None
    magic = int(_read_numbers(head, "<i4")[0])
    if magic in LLM_C and len(head) >= LLM_C_HEADER:
        dtype, ids = LLM_C[magic]
        return Format(f"has llm.c's header of 256 int32 before {ids}", dtype, LLM_C_HEADER)
    return _detect_wide(head) or _detect_narrow(head)


def _detect_wide(head: bytes) -> Format | None:
    """Return the format of ids of four or eight bytes."""
    mean_as_uint16 = _read_numbers(head, "<u2").mean()
    with np.errstate(all="ignore"):  # NaN among floats
        for dtype, name in WIDE_FORMATS.items():
            ids = _read_numbers(head, dtype)
            are_ids = ids.min() >= 0 and 0 < ids.max() < LARGEST and np.all(ids == np.floor(ids))
            # two uint16 ids read as one number are much larger than they are
            if are_ids and ids.mean() <= 4 * mean_as_uint16:
                return Format(f"looks like {name} ids", dtype)
    return None


def _detect_narrow(head: bytes) -> Format | None:
    """Return the format of ids of one byte, or of two in the other byte order.

    Frequent tokens have small ids, so the high byte of an id is smaller than its low byte.
    """
    native = _read_numbers(head, "<u2")
    swapped = _read_numbers(head, ">u2")
    largest_low = int((native & 255).max())
    largest_high = int((native >> 8).max())
    if largest_low < largest_high and 2 * swapped.mean() < native.mean():
        return Format("looks like big-endian uint16 ids", ">u2")
    if largest_low < 128 and largest_high >= 4 and largest_low <= 2 * largest_high:  # both bytes are ids
        return Format("looks like uint8 ids", "u1")
    return None


def _read_numbers(head: bytes, dtype: str) -> npt.NDArray[Any]:
    return np.frombuffer(head, dtype, count=len(head) // np.dtype(dtype).itemsize)


def _numpy_format(path: Path) -> Format:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError):
        array = None
    if not isinstance(array, np.memmap) or array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(
            f"{path}: is a NumPy file (.npy), but not a one-dimensional array of integers; prepare the data again"
        )
    return Format("is a NumPy file (.npy)", array.dtype.str, array.offset)


def _conversion_remedy(folder: Path) -> str:
    """Return the command that writes the token files of `folder` as uint16 ids into a subfolder.

    The token files themselves stay as they are. If their ids do not fit into uint16, the remedy says so instead.
    """
    files = []
    for path in (folder / "train.bin", folder / "val.bin"):
        if not path.is_file():
            continue
        form = _detect_format(path) or BARE_UINT16
        smallest, largest = _id_range(path, form)
        if smallest < 0 or largest >= 2**16:
            return (
                f"the ids of {path.name}, from {smallest} to {largest}, do not fit into uint16; prepare the text with "
                "losscurve prepare"
            )
        files.append((path.name, form.dtype, form.offset))
    copy_meta = "; import shutil; shutil.copy(a + '/meta.pkl', b)" if (folder / "meta.pkl").is_file() else ""
    code = (
        "import os, sys, numpy as np; a, b = sys.argv[1:]; os.makedirs(b, exist_ok=True); "
        "[np.fromfile(f'{a}/{n}', t, offset=o).astype('<u2').tofile(f'{b}/{n}') "
        f"for n, t, o in {files}]{copy_meta}"
    )
    source = shlex.quote(str(folder))
    target = shlex.quote(str(folder / "uint16"))
    return f'give --data_dir {target} after converting them with: python -c "{code}" {source} {target}'


def _id_range(path: Path, form: Format) -> tuple[Any, Any]:
    """Return the smallest and the largest id of a file, 0 and 0 if it is empty."""
    count = (path.stat().st_size - form.offset) // np.dtype(form.dtype).itemsize
    if not count:
        return 0, 0
    ids = np.memmap(path, form.dtype, "r", form.offset, shape=(count,))
    return ids.min(), ids.max()


def characters(folder: Path) -> Characters | None:
    """Return the alphabet of the token files of `folder`, from nanoGPT's `meta.pkl`; None if there is none.

    Raises:
        UserError: the file is not plain data, or has no alphabet.
    """
    path = folder / "meta.pkl"
    if not path.is_file():
        return None
    remedy = "prepare the text again, or move it away and give the size of the vocabulary with --vocab_size"
    try:
        with path.open("rb") as file:
            content = file.read(META_LIMIT + 1)
        meta = _load_plain_pickle(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}, so it is not read; {remedy}") from None
    itos = meta.get("itos") if isinstance(meta, dict) else None
    if not isinstance(itos, dict) or not all(isinstance(token, str) and len(token) == 1 for token in itos.values()):
        raise UserError(f"{path}: has no itos of one character an id, as nanoGPT's has; {remedy}")
    alphabet: list[Any] = [itos.get(i) for i in range(len(itos))]
    if None in alphabet or alphabet != sorted(set(itos.values())) or meta.get("vocab_size") != len(alphabet):
        raise UserError(f"{path}: its characters are not numbered in the order of their code points; {remedy}")
    return Characters(itos.values())


def _load_plain_pickle(content: bytes) -> Any:
    """Return the value of a pickle that is plain data. Raises ValueError for any other."""
    if len(content) > META_LIMIT:
        raise ValueError(f"has more than {META_LIMIT >> 20} MiB")
    for instruction, argument, _ in pickletools.genops(content):  # raises ValueError if the pickle is truncated
        if instruction.name not in PLAIN_INSTRUCTIONS:
            raise ValueError(f"is a pickle with more than plain data in it ({instruction.name})")
        if instruction.name.endswith("PUT") and (argument or 0) > len(content):
            raise ValueError("is a pickle that asks for more memory than its data needs")
    try:
        return _PlainUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a damaged pickle raises errors of many classes
        raise ValueError(f"is a damaged pickle ({type(error).__name__})") from None


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")
