"""What the bytes of a file are when they are not UTF-8 text, and the command that makes text of them.

The commands are filters: `iconv … < a.txt > a.utf8.txt`, so that they serve files, compressed files and streams alike,
and never write over the file they read.
"""

import codecs
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from llm.errors import UserError

HEAD = 2**20  # bytes that tell what a file is


NULS = 1000  # one NUL in so many bytes may be a slip in a text; more are not


MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


UNMARKED = ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")


KEPT = (".txt", ".md", ".jsonl", ".ndjson")  # endings that the text of such a file keeps


PACKED = {".gz": "gzip -dc", ".zst": "zstd -dc"}  # read as what is in them


ARCHIVES = (".tgz", ".txz", ".tbz", ".tar.gz", ".tar.xz", ".tar.bz2", ".tar.zst")


UNPACK = "unpack it and give the folder: mkdir {folder} && tar -xf {file} -C {folder}"


OTHER = "give a text instead"


WITHOUT_NUL = "tr -d '\\000'"


ONLY_UTF8 = "iconv -c -f UTF-8 -t UTF-8"


# where the bytes stand, the bytes, what they say, and the remedy: a filter after "|", or words
MAGIC = (
    (0, b"\x1f\x8b", "compressed by gzip", "| gzip -dc"),
    (0, b"\xfd7zXZ\x00", "compressed by xz", "| xz -dc"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by Zstandard", "| zstd -dc"),
    (0, b"\x04\x22\x4d\x18", "compressed by lz4", "| lz4 -dc"),
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it and give the folder: 7z x -o{folder} {file}"),
    (0, b"Rar!\x1a\x07", "a RAR archive", "unpack it and give the folder: unrar x {file} {folder}/"),
    (0, b"%PDF-", "a PDF", "| pdftotext - -"),
    (0, b"%!PS", "PostScript", "| ps2ascii"),
    (0, b"{\\rtf", "rich text (RTF)", "| pandoc -f rtf -t plain"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", "save it as plain text in UTF-8"),
    (60, b"BOOKMOBI", "a Kindle book", "convert it: ebook-convert {file} {text}"),
    (0, b"\x89PNG\r\n\x1a\n", "a picture (PNG)", OTHER),
    (0, b"\xff\xd8\xff", "a picture (JPEG)", OTHER),
    (0, b"GIF8", "a picture (GIF)", OTHER),
    (0, b"\x7fELF", "a program (ELF)", OTHER),
    (0, b"SQLite format 3\x00", "an SQLite database", "export its text as JSON Lines"),
    (0, b"PAR1", "Parquet", "give it the ending that says so: mv {file} {file}.parquet"),
    (0, b"ARROW1", "Arrow", "save it as Parquet or JSON Lines"),
    (0, b"GGUF", "weights of a model (GGUF)", OTHER),
    (0, b"\x93NUMPY", "an array of NumPy", OTHER),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5", "save its text as JSON Lines"),
)


ZIPPED = (  # a name in a zip archive, what the archive then is, and the remedy
    (rb"\[Content_Types\]\.xml.*word/", "a Word document (docx)", "| pandoc -f docx -t plain"),
    (rb"\[Content_Types\]\.xml.*xl/", "a spreadsheet (xlsx)", "save it as CSV in UTF-8"),
    (rb"\[Content_Types\]\.xml.*ppt/", "a presentation (pptx)", "| pandoc -f pptx -t plain"),
    (rb"mimetypeapplication/epub\+zip", "a book (EPUB)", "| pandoc -f epub -t plain"),
    (rb"mimetypeapplication/vnd\.oasis\.opendocument\.text", "an OpenDocument text", "| pandoc -f odt -t plain"),
    (rb"data\.pkl", "weights of a model (PyTorch)", OTHER),
    (rb"\.npy", "arrays of NumPy", OTHER),
    (rb"", "a zip archive", "unpack it and give the folder: unzip {file} -d {folder}"),
)


# Encodings of one or several bytes that a text may be in, as both Python and iconv name them
ENCODINGS = ("CP1251", "KOI8-R", "GB18030", "BIG5", "SHIFT_JIS", "EUC-JP", "EUC-KR", "CP1250", "CP1253", "CP850")


# What Western text in Windows-1252 or Latin-1 does not have: signs inside words, capitals inside them, three accented
# letters in a row, bytes that stand for nothing
NOT_WESTERN = re.compile(
    rb"[A-Za-z][\x80-\x82\x84\x86-\x89\x8b\x91\x93\x95\x98\x99\x9b\xa1-\xac\xae-\xb3\xb5\xb6\xb8-\xbf][a-z]"
    rb"|[a-z][\xc0-\xde][a-z]|[\xc0-\xff]{3}|[\x81\x8d\x8f\x90\x9d]"
)


def check_format(head: bytes, label: str, name: str = "") -> None:
    """Raise UserError if `head`, the first HEAD bytes of a file, are those of a known format or encoding but UTF-8.

    `label` names the file to a person, `name` to a shell; a stream has no `name`.
    """
    if found := _format(head, name):
        what, remedy = found
        raise UserError(f"{label}: {what}, not plain text; {_remedy(remedy, name)}")
    if encoding := _wide(head):
        mark = "" if encoding in UNMARKED else ", by its byte-order mark"
        raise UserError(
            f"{label}: text in {encoding}{mark}, not UTF-8; convert it: "
            + convert(f"iconv -f {encoding} -t UTF-8", name)
        )


def check(head: bytes, label: str, name: str = "") -> None:
    """Raise UserError if `head`, the first HEAD bytes of a file, are known not to be plain text in UTF-8."""
    check_format(head, label, name)
    if (count := head.count(0)) * NULS > len(head):
        beside = Path(name).parent if name else Path()
        if name.endswith(".bin") and any((beside / other).exists() for other in ("meta.json", "meta.pkl", "val.bin")):
            raise UserError(
                f"{label}: token ids, not text; train on their folder with --data_dir {shlex.quote(str(beside))}"
            )
        raise UserError(
            f"{label}: binary data, not text ({count:,} of its first {len(head):,} bytes are NUL); give a text, or "
            f"drop them: {convert(WITHOUT_NUL, name)}"
        )


def not_utf8(window: bytes, place: int, name: str = "", begin: int | None = None) -> str:
    """Say what `window` is instead of UTF-8, whose decoding fails at its byte `place`, and the remedy.

    `begin` is where it begins in the file, None for a line of it.
    """
    before, after = window[:place], window[place:]
    good = sum(1 for char in before.decode("utf-8", "replace") if char > "\x7f")
    decoded = after.decode("utf-8", "replace")
    bad = decoded.count("\ufffd")
    later = sum(1 for char in decoded if char > "\x7f" and char != "\ufffd")
    counts = Counter(window)
    if sum(counts[byte] for byte in (*range(9), *range(14, 27))) * 50 > len(window):
        return "binary data, not text; give a text"
    if len(after) < 4 and bad == 1 and not later and good:
        rest = "" if begin is None else f", or drop its last bytes: {convert(f'head -c {begin + place}', name)}"
        return f"cut off in the middle of a character; get the whole file{rest}"
    if good > 2 or later > bad:
        return (
            f"UTF-8 before and another encoding from there on, byte 0x{after[0]:02X}; convert that part alone, "
            f"or drop what is not UTF-8: {convert(ONLY_UTF8, name)}"
        )
    if _western(window, counts):
        encoding = "WINDOWS-1252" if any(counts[byte] for byte in range(0x80, 0xA0)) else "LATIN1"
        return f"{encoding} if this reads right: {_excerpt(window, place, encoding)!r}; convert it: " + convert(
            f"iconv -f {encoding} -t UTF-8", name
        )
    readings = [f"{_excerpt(window, place, encoding)!r} as {encoding}" for encoding in _candidates(window)]
    shown = f", which reads {', '.join(readings)}" if readings else ""
    return (
        f"byte 0x{after[0]:02X}{shown}; convert it from the ENCODING that reads right (iconv -l lists all): "
        + convert("iconv -f ENCODING -t UTF-8", name)
    )


def decode(content: bytes, label: str, name: str = "") -> str:
    """The text of a small file, without a byte-order mark. Raises UserError saying what it is instead."""
    check(content[:HEAD], label, name)
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{label}: not UTF-8 at byte {error.start}: {not_utf8(content, error.start, name, 0)}"
        ) from None


def convert(command: str, name: str) -> str:
    """The shell command by which the filter `command` makes text of the file `name`; a stream is piped through it."""
    if not name:
        return f"… | {command} | losscurve …"
    source, packed = shlex.quote(name), PACKED.get(Path(name).suffix.lower())
    begin = f"{packed} < {source} | {command}" if packed else f"{command} < {source}"
    return f"{begin} > {shlex.quote(converted(name))}"


def quoted(name: str) -> str:
    """A file's name for a shell, never taken for a flag."""
    return shlex.quote(f"./{name}" if name.startswith("-") else name)


def converted(name: str) -> str:
    """The name of the text that `convert` makes: a.utf8.txt of a.txt, a.txt.gz or a.pdf."""
    path = Path(name)
    while path.suffix.lower() in (*PACKED, ".xz", ".bz2", ".lz4"):
        path = path.with_suffix("")
    return str(path.with_name(f"{path.stem}.utf8{path.suffix if path.suffix.lower() in KEPT else '.txt'}"))


def _remedy(remedy: str, name: str) -> str:
    if remedy.startswith("| "):
        return "convert it: " + convert(remedy[2:], name)
    if not name:
        return remedy.format(file="FILE", folder="FOLDER", text="TEXT")
    folder = str(Path(name).with_name(Path(name).name.split(".")[0] + "-unpacked"))
    return remedy.format(file=quoted(name), folder=quoted(folder), text=quoted(converted(name)))


def _format(head: bytes, name: str) -> tuple[str, str] | None:
    """What a file is by its first bytes, and the remedy."""
    for place, magic, what, remedy in MAGIC:
        if head.startswith(magic, place) and (0 in head or not magic.isalnum()):  # a text may begin with "PAR1" too
            archive = remedy.startswith("| ") and name.lower().endswith(ARCHIVES)
            return what, UNPACK if archive else remedy
    if re.match(rb"BZh[1-9]1AY&SY", head):
        return "compressed by bzip2", UNPACK if name.lower().endswith(ARCHIVES) else "| bzip2 -dc"
    if head.startswith(b"PK\x03\x04"):
        return next((what, remedy) for inside, what, remedy in ZIPPED if re.search(inside, head, re.DOTALL))
    if re.match(rb"\x80[\x02-\x05]", head):
        return "a pickle of Python", "save its text as a file, or its rows as JSON Lines"
    if re.match(rb"[^\x00].{6}\x00\{\"", head, re.DOTALL):  # the length of a header of JSON
        return "weights of a model (safetensors)", OTHER
    return None


def _wide(head: bytes) -> str:
    """The encoding of two or four bytes a character that a text is in; "" if it is in none."""
    for mark, encoding in MARKS:
        if head.startswith(mark):
            return encoding
    if head.count(0) * NULS <= len(head):
        return ""
    found = [
        (sum(char < "\x80" for char in text), e) for e in UNMARKED if (text := _strictly(head, e)) and _plain(text)
    ]
    return max(found)[1] if found else ""


def _strictly(content: bytes, encoding: str) -> str:
    """The text of the beginning of a file, whose last character may be cut off; "" if it is not in that encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(content)
    except UnicodeDecodeError:
        return ""


def _plain(text: str) -> bool:
    """Whether a text has a space or line break, and no control character or one that Unicode has not assigned."""
    odd = (char for char in set(text) if not char.isprintable() and not char.isspace() and char not in "\ufeff\xad")
    return not any(odd) and any(char in text for char in " \n")


def _western(window: bytes, counts: Counter[int]) -> bool:
    high = sum(count for byte, count in counts.items() if byte >= 0x80)
    letters = sum(count for byte, count in counts.items() if chr(byte).isalpha() and byte < 0x80)
    return 3 * high < letters and not NOT_WESTERN.search(window)


def _candidates(window: bytes) -> Sequence[str]:
    """Up to four encodings in which `window` could be written, the likelier ones first."""
    found = []
    for encoding in ENCODINGS:
        foreign = re.sub(r"[\x00-\x7f]+", " ", _strictly(window, encoding))
        signs = sum(1 for char in foreign if char != " ")
        if signs:
            # letters, but no capital after a small one, as a wrong reading has many
            odd = len(re.findall(r"[a-zß-öø-ÿα-ώа-џ][À-ÖØ-ÞΑ-ΫЀ-Я]", foreign))
            found.append(((sum(char.isalpha() for char in foreign) - 2 * odd) / signs, encoding))
    return [encoding for _, encoding in sorted(found, key=lambda pair: -pair[0])[:4]]


def _excerpt(window: bytes, place: int, encoding: str) -> str:
    """Some characters around a byte, as they read in an encoding."""
    start = max(window.rfind(b"\n", 0, place) + 1, place - 200)
    before = window[start:place].decode(encoding, "replace")[-12:]
    text = before + window[place : place + 60].decode(encoding, "replace").partition("\n")[0][:16]
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())
