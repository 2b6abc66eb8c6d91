"""What a file from elsewhere is, by what stands in it and beside it: named, and never guessed in silence.

A `train.bin` without a `meta.json` is read as bare little-endian uint16 ids, nanoGPT's format. Ids in other formats are
refused with a command that converts them: read as uint16 many of them would train all the same. nanoGPT's character
data has its alphabet beside it, in `meta.pkl`: a pickle, which is read only if it is plain data and so cannot run code.
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

HEAD = 2**20  # bytes that are looked at


FEW = 256  # bytes: fewer show no pattern


LARGEST = 2**18  # ids are below this in every vocabulary of today; what is read in a wrong format soon is not


# llm.c's header: 256 int32, of which the first says what follows
LLM_C = {20240520: ("<u2", "GPT-2's ids"), 20240801: ("<u4", "Llama 3's ids")}


LLM_C_HEADER = 1024  # bytes


WIDE = {  # in the order in which they are tried
    **{"<f8": "float64", "<f4": "float32"},
    **{"<i8": "int64", ">i8": "big-endian int64", "<u4": "uint32", ">u4": "big-endian uint32"},
}


SIGNATURES = {
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "fetch it with: git lfs pull"),
    b"\x1f\x8b\x08": ("a gzip file", "unpack it first, with gunzip"),
    b"\x28\xb5\x2f\xfd": ("a Zstandard file", "unpack it first, with unzstd"),
    b"\xfd7zXZ\0": ("an xz file", "unpack it first, with unxz"),
    b"BZh": ("a bzip2 file", "unpack it first, with bunzip2"),
    b"PK\3\4": ("a zip archive", "unpack it first, and give the file in it"),
}


META_LIMIT = 2**22  # bytes of a meta.pkl; nanoGPT's of all of Unicode would have a quarter


# the instructions of a pickle that make dicts, lists, texts and numbers, and nothing else: none imports or calls
PLAIN = {
    *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BININT", "BININT1", "BININT2"),
}


@dataclass(frozen=True)
class Format:
    """Ids that are not bare little-endian uint16, and how NumPy reads them."""

    words: str
    dtype: str
    offset: int = 0  # bytes before the first id


def signature(head: bytes) -> tuple[str, str] | None:
    """Return what a file is by its first bytes, and a remedy, where it is no file of numbers."""
    for magic, words in SIGNATURES.items():
        if head.startswith(magic):
            return words
    start = head[:1000].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page", "download the file itself, not the page that shows it"
    return None


def is_text(head: bytes) -> bool:
    """Whether these are the first bytes of a text, in UTF-8 or an older encoding that has ASCII in it."""
    if len(head) < 16 or b"\0" in head:
        return False
    values = np.frombuffer(head, np.uint8)
    if np.mean((values >= 32) & (values < 127)) > 0.75:
        return True
    text = head.decode("utf-8", errors="ignore")
    whole = len(head) - len(text.encode("utf-8")) < 4  # the last character may be cut
    return whole and not any(ord(character) < 32 and character not in "\t\n\r\f" for character in text)


def check_format(path: Path) -> None:
    """Raises UserError naming what the token file at `path` is where it is not bare uint16 ids. One that cannot be
    opened is left to whoever opens it.
    """
    try:
        head = _head(path)
    except OSError:
        return
    if found := signature(head):
        raise UserError(f"{path}: is {found[0]}; {found[1]}")
    if is_text(head):
        raise UserError(
            f"{path}: is a text, not token ids; train on it with: losscurve train --text {shlex.quote(str(path))}"
        )
    if other := _format_of(path):
        raise UserError(
            f"{path}: {other.words}, and without a meta.json only bare uint16 ids are read; {_conversion(path.parent)}"
        )


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def _format_of(path: Path) -> Format | None:
    """The format of a file of numbers, None for bare uint16 ids and for what cannot be told from them."""
    head = _head(path)
    if head.startswith(b"\x93NUMPY"):
        return _numpy_file(path)
    if len(head) < FEW:
        return None
    magic = int(_read(head, "<i4")[0])
    if magic in LLM_C and len(head) >= LLM_C_HEADER:
        dtype, whose = LLM_C[magic]
        return Format(f"has llm.c's header of 256 int32 before {whose}", dtype, LLM_C_HEADER)
    native, swapped = _read(head, "<u2"), _read(head, ">u2")
    with np.errstate(all="ignore"):  # floats that are not a number
        for dtype, name in WIDE.items():
            ids = _read(head, dtype)
            whole = ids.min() >= 0 and 0 < ids.max() < LARGEST and np.all(ids == np.floor(ids))
            if whole and ids.mean() <= 4 * native.mean():  # two uint16 ids read as one number are much larger
                return Format(f"looks like {name} ids", dtype)
    # frequent tokens have small ids: of an id's two bytes the higher one is the smaller
    low, high = int((native & 255).max()), int((native >> 8).max())
    if low < high and 2 * swapped.mean() < native.mean():
        return Format("looks like big-endian uint16 ids", ">u2")
    if low < 128 and high >= 4 and low <= 2 * high:  # both are ids
        return Format("looks like uint8 ids", "u1")
    return None


def _read(head: bytes, dtype: str) -> npt.NDArray[Any]:
    return np.frombuffer(head, dtype, count=len(head) // np.dtype(dtype).itemsize)


def _numpy_file(path: Path) -> Format:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError):
        array = None
    if not isinstance(array, np.memmap) or array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(f"{path}: is a NumPy file (.npy) of something else than a row of ids; prepare the data again")
    return Format("is a NumPy file (.npy)", array.dtype.str, array.offset)


def _conversion(folder: Path) -> str:
    """The command that writes the token files of `folder` as uint16 ids into a folder in it, and leaves them as they
    are; or why there is none.
    """
    files = []
    for path in (folder / "train.bin", folder / "val.bin"):
        if not path.is_file():
            continue
        form = _format_of(path) or Format("", "<u2")
        count = (path.stat().st_size - form.offset) // np.dtype(form.dtype).itemsize
        ids = np.memmap(path, form.dtype, "r", form.offset, shape=(count,)) if count else np.zeros(1)
        if ids.min() < 0 or ids.max() >= 2**16:
            return f"ids from {ids.min()} to {ids.max()} in {path.name} do not fit: make them with losscurve prepare"
        files.append((path.name, form.dtype, form.offset))
    also = "; import shutil; shutil.copy(a + '/meta.pkl', b)" if (folder / "meta.pkl").is_file() else ""
    code = (
        "import os, sys, numpy as np; a, b = sys.argv[1:]; os.makedirs(b, exist_ok=True); "
        "[np.fromfile(f'{a}/{n}', t, offset=o).astype('<u2').tofile(f'{b}/{n}') "
        f"for n, t, o in {files}]{also}"
    )
    source, target = (shlex.quote(str(path)) for path in (folder, folder / "uint16"))
    return f'give --data_dir {target} once you have converted them: python -c "{code}" {source} {target}'


def characters(folder: Path) -> Characters | None:
    """Return the alphabet that nanoGPT's `meta.pkl` gives to the token files of `folder`; None where it is not there.

    Raises UserError for one that is not plain data, or says something else.
    """
    path = folder / "meta.pkl"
    if not path.is_file():
        return None
    otherwise = "prepare the text again, or move it away and give the size of the vocabulary with --vocab_size"
    try:
        with path.open("rb") as file:
            content = file.read(META_LIMIT + 1)
        meta = _plain(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}, so it is not read; {otherwise}") from None
    itos = meta.get("itos") if isinstance(meta, dict) else None
    if not isinstance(itos, dict) or not all(isinstance(token, str) and len(token) == 1 for token in itos.values()):
        raise UserError(f"{path}: has no itos of one character an id, as nanoGPT's has; {otherwise}")
    alphabet: list[Any] = [itos.get(i) for i in range(len(itos))]
    if None in alphabet or alphabet != sorted(set(itos.values())) or meta.get("vocab_size") != len(alphabet):
        raise UserError(f"{path}: its characters are not numbered in the order of their code points; {otherwise}")
    return Characters(itos.values())


def _plain(content: bytes) -> Any:
    """The value of a pickle that is plain data. Raises ValueError for any other."""
    if len(content) > META_LIMIT:
        raise ValueError(f"has more than {META_LIMIT >> 20} MiB")
    for instruction, argument, _ in pickletools.genops(content):  # ValueError where it is torn
        if instruction.name not in PLAIN:
            raise ValueError(f"is a pickle with more than plain data in it ({instruction.name})")
        if instruction.name.endswith("PUT") and (argument or 0) > len(content):
            raise ValueError("is a pickle that asks for more memory than it has use for")
    try:
        return _Unpickler(io.BytesIO(content)).load()
    except Exception as error:  # whatever a torn one raises
        raise ValueError(f"is a damaged pickle ({type(error).__name__})") from None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")
