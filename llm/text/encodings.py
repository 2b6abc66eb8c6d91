"""The encoding of bytes that are not UTF-8, and the command that converts them."""

import codecs
import re
from collections import Counter
from collections.abc import Sequence

from llm.text.conversion import conversion_command

NUL_RATIO = 1000  # bytes: a text may hold one stray NUL in so many, not more


BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16, whose mark is a prefix of this one
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


WITHOUT_MARK = ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")


ONLY_UTF8 = "iconv -c -f UTF-8 -t UTF-8"  # a filter that drops what is not UTF-8


# Control characters, without white space (9 to 13), escape (27) and the separators (28 to 31)
CONTROL_BYTES = (*range(9), *range(14, 27))


# Encodings of one or several bytes a character, by the names that both Python and iconv know
ENCODINGS = ("CP1251", "KOI8-R", "GB18030", "BIG5", "SHIFT_JIS", "EUC-JP", "EUC-KR", "CP1250", "CP1253", "CP850")


# What Western text in Windows-1252 or Latin-1 does not contain: symbols inside words, capitals inside words, three
# accented letters in a row, bytes that are not assigned
NOT_WESTERN = re.compile(
    rb"[A-Za-z][\x80-\x82\x84\x86-\x89\x8b\x91\x93\x95\x98\x99\x9b\xa1-\xac\xae-\xb3\xb5\xb6\xb8-\xbf][a-z]"
    rb"|[a-z][\xc0-\xde][a-z]|[\xc0-\xff]{3}|[\x81\x8d\x8f\x90\x9d]"
)


# A capital after a small letter: text decoded with a wrong encoding has many
CAPITAL_AFTER_SMALL = re.compile(r"[a-zß-öø-ÿα-ώа-џ][À-ÖØ-ÞΑ-ΫЀ-Я]")


def detect_wide_encoding(head: bytes) -> str:
    """Return the encoding of two or four bytes a character that a text is in, "" if it is in none.

    It is known by its byte-order mark, or by NUL bytes that decode to plain text.
    """
    for mark, encoding in BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return encoding
    if head.count(0) * NUL_RATIO <= len(head):
        return ""
    candidates = []
    for encoding in WITHOUT_MARK:
        text = _decode_prefix(head, encoding)
        if text and _is_plain(text):
            ascii_count = sum(char < "\x80" for char in text)
            candidates.append((ascii_count, encoding))
    return max(candidates)[1] if candidates else ""


def describe_not_utf8(window: bytes, place: int, shell_name: str = "", begin: int | None = None) -> str:
    """Return what `window`, whose UTF-8 decoding fails at its byte `place`, holds instead, and the remedy.

    `begin` is the position of the window in the file, None if the window is one line of it.
    """
    before = window[:place]
    after = window[place:]
    good_before = sum(char > "\x7f" for char in before.decode("utf-8", "replace"))
    decoded_after = after.decode("utf-8", "replace")
    bad_after = decoded_after.count("\ufffd")
    good_after = sum(char > "\x7f" for char in decoded_after) - bad_after
    counts = Counter(window)

    if sum(counts[byte] for byte in CONTROL_BYTES) * 50 > len(window):
        return "binary data, not text; give a text file"
    is_truncated = len(after) < 4 and bad_after == 1 and good_after == 0 and good_before > 0
    if is_truncated:
        cause = "cut off in the middle of a character; get the whole file"
        if begin is None:
            return cause
        return f"{cause}, or drop its last bytes: {conversion_command(f'head -c {begin + place}', shell_name)}"
    if good_before > 2 or good_after > bad_after:
        return (
            f"UTF-8 before and another encoding from there on, byte 0x{after[0]:02X}; convert that part alone, "
            f"or drop what is not UTF-8: {conversion_command(ONLY_UTF8, shell_name)}"
        )
    if _is_western(window, counts):
        has_c1_bytes = any(counts[byte] for byte in range(0x80, 0xA0))
        encoding = "WINDOWS-1252" if has_c1_bytes else "LATIN1"
        command = conversion_command(f"iconv -f {encoding} -t UTF-8", shell_name)
        return f"{encoding} if this reads right: {_excerpt(window, place, encoding)!r}; convert it: {command}"
    readings = [f"{_excerpt(window, place, encoding)!r} as {encoding}" for encoding in _likely_encodings(window)]
    reading = f", which reads {', '.join(readings)}" if readings else ""
    command = conversion_command("iconv -f ENCODING -t UTF-8", shell_name)
    return (
        f"byte 0x{after[0]:02X}{reading}; convert it from the ENCODING that reads right (iconv -l lists all): {command}"
    )


def _decode_prefix(content: bytes, encoding: str) -> str:
    """Decode the beginning of a file, whose last character may be incomplete; "" if it is not in that encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(content)
    except UnicodeDecodeError:
        return ""


def _is_plain(text: str) -> bool:
    """Whether a text has a space or a line break, and no control character or unassigned code point."""
    allowed = "\ufeff\xad"  # the byte-order mark and the soft hyphen
    for char in set(text):
        if not (char.isprintable() or char.isspace() or char in allowed):
            return False
    return " " in text or "\n" in text


def _is_western(window: bytes, counts: Counter[int]) -> bool:
    high = sum(count for byte, count in counts.items() if byte >= 0x80)
    ascii_letters = sum(count for byte, count in counts.items() if byte < 0x80 and chr(byte).isalpha())
    return 3 * high < ascii_letters and not NOT_WESTERN.search(window)


def _likely_encodings(window: bytes) -> Sequence[str]:
    """Return up to four encodings that `window` could be in, the likeliest first."""
    scored = []
    for encoding in ENCODINGS:
        foreign = re.sub(r"[\x00-\x7f]+", " ", _decode_prefix(window, encoding))
        char_count = sum(char != " " for char in foreign)
        if char_count:
            letter_count = sum(char.isalpha() for char in foreign)
            wrong_count = len(CAPITAL_AFTER_SMALL.findall(foreign))
            scored.append(((letter_count - 2 * wrong_count) / char_count, encoding))
    scored.sort(key=lambda pair: -pair[0])
    return [encoding for _, encoding in scored[:4]]


def _excerpt(window: bytes, place: int, encoding: str) -> str:
    """Decode some characters around a byte."""
    line_start = window.rfind(b"\n", 0, place) + 1
    start = max(line_start, place - 200)
    before = window[start:place].decode(encoding, "replace")
    after = window[place : place + 60].decode(encoding, "replace").partition("\n")[0]
    text = before[-12:] + after[:16]
    printable = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(printable.split())
