"""The format of a file that is not UTF-8 text, and the command that makes text of it.

`label` is the name of a file in messages; `shell_name` is the name by which a shell finds it, "" for a stream.
"""

import re
import shlex
from pathlib import Path

from llm.errors import UserError
from llm.text.conversion import ARCHIVE_SUFFIXES, conversion_command, fill_remedy
from llm.text.encodings import NUL_RATIO, WITHOUT_MARK, describe_not_utf8, detect_wide_encoding

HEAD = 2**20  # bytes from which the format of a file is recognised


UNPACK = "unpack it and give the folder: mkdir {folder} && tar -xf {file} -C {folder}"


OTHER = "give a text file instead"


WITHOUT_NUL = "tr -d '\\000'"  # a filter


TOKEN_FOLDER_FILES = ("meta.json", "meta.pkl", "val.bin")  # one of these stands beside a file of token ids


# offset of the signature, the signature, the format, and the remedy: a filter after "| ", or words
SIGNATURES = (
    (0, b"\x1f\x8b", "compressed by gzip", "| gzip -dc"),
    (0, b"\xfd7zXZ\x00", "compressed by xz", "| xz -dc"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by Zstandard", "| zstd -dc"),
    (1, b"\x2a\x4d\x18", "compressed by Zstandard", "| zstd -dc"),  # by pzstd, which begins with a skipped frame
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
    (0, b"PAR1", "Parquet", "rename it: mv {file} {file}.parquet"),
    (0, b"ARROW1", "Arrow", "save it as Parquet or JSON Lines"),
    (0, b"GGUF", "model weights (GGUF)", OTHER),
    (0, b"\x93NUMPY", "a NumPy array", OTHER),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5", "save its text as JSON Lines"),
)


ZIP_FORMATS = (  # a pattern of the names in a zip archive, the format, and the remedy
    (rb"\[Content_Types\]\.xml.*word/", "a Word document (docx)", "| pandoc -f docx -t plain"),
    (rb"\[Content_Types\]\.xml.*xl/", "a spreadsheet (xlsx)", "save it as CSV in UTF-8"),
    (rb"\[Content_Types\]\.xml.*ppt/", "a presentation (pptx)", "save it as plain text in UTF-8"),
    (rb"mimetypeapplication/epub\+zip", "a book (EPUB)", "| pandoc -f epub -t plain"),
    (rb"mimetypeapplication/vnd\.oasis\.opendocument\.text", "an OpenDocument text", "| pandoc -f odt -t plain"),
    (rb"data\.pkl", "model weights (PyTorch)", OTHER),
    (rb"\.npy", "NumPy arrays", OTHER),
    (rb"", "a zip archive", "unpack it and give the folder: unzip {file} -d {folder}"),
)


def check_format(head: bytes, label: str, shell_name: str = "") -> None:
    """Check that `head`, the first HEAD bytes of a file, has no known format and no encoding of 2 or 4 bytes.

    Raises:
        UserError: names the format or the encoding, and the command that converts it.
    """
    if found := _detect_format(head, shell_name):
        file_format, remedy = found
        raise UserError(f"{label}: {file_format}, not plain text; {fill_remedy(remedy, shell_name)}")
    if encoding := detect_wide_encoding(head):
        mark = "" if encoding in WITHOUT_MARK else ", by its byte-order mark"
        command = conversion_command(f"iconv -f {encoding} -t UTF-8", shell_name)
        raise UserError(f"{label}: text in {encoding}{mark}, not UTF-8; convert it: {command}")


def check(head: bytes, label: str, shell_name: str = "") -> None:
    """Check that `head`, the first HEAD bytes of a file, can be plain text in UTF-8.

    Raises:
        UserError: names what the file is instead, and the remedy.
    """
    check_format(head, label, shell_name)
    nul_count = head.count(0)
    if nul_count * NUL_RATIO <= len(head):
        return
    folder = Path(shell_name).parent if shell_name else Path()
    if shell_name.endswith(".bin") and any((folder / name).exists() for name in TOKEN_FOLDER_FILES):
        raise UserError(
            f"{label}: token ids, not text; train on their folder with --data_dir {shlex.quote(str(folder))}"
        )
    raise UserError(
        f"{label}: binary data, not text ({nul_count:,} of its first {len(head):,} bytes are NUL); give a text file, "
        f"or drop the NUL bytes: {conversion_command(WITHOUT_NUL, shell_name)}"
    )


def decode(content: bytes, label: str, shell_name: str = "") -> str:
    """Return the text of a small file, without a byte-order mark.

    Raises:
        UserError: the content is not UTF-8; names what it is instead, and the remedy.
    """
    check(content[:HEAD], label, shell_name)
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        cause = describe_not_utf8(content, error.start, shell_name, begin=0)
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{label}: not UTF-8 at byte {error.start} (line {line}): {cause}") from None


def _detect_format(head: bytes, name: str) -> tuple[str, str] | None:
    """Return the format of a file by its first bytes, and the remedy; None if the format is unknown."""
    is_archive = name.lower().endswith(ARCHIVE_SUFFIXES)
    for offset, signature, file_format, remedy in SIGNATURES:
        # A text may begin with letters such as "PAR1" too; then it holds no NUL
        if head.startswith(signature, offset) and (0 in head or not signature.isalnum()):
            is_filter = remedy.startswith("| ")
            return file_format, UNPACK if is_filter and is_archive else remedy
    if re.match(rb"BZh[1-9]1AY&SY", head):
        return "compressed by bzip2", UNPACK if is_archive else "| bzip2 -dc"
    if head.startswith(b"PK\x03\x04"):
        for pattern, file_format, remedy in ZIP_FORMATS:  # the last pattern matches every archive
            if re.search(pattern, head, re.DOTALL):
                return file_format, remedy
    if re.match(rb"\x80[\x02-\x05]", head):
        return "a Python pickle", "save its text as a file, or its rows as JSON Lines"
    if re.match(rb"[^\x00].{6}\x00\{\"", head, re.DOTALL):  # the length of a JSON header, 8 bytes
        return "model weights (safetensors)", OTHER
    return None
