"""Where a text may be cut so that the ids of the parts, joined, are those of the whole.

GPT-2's pre-tokenizer splits a text into words from left to right, and no merge of a BPE crosses a split.
"""

import re
import sys
from collections.abc import Iterable, Iterator

from llm.errors import UserError

# GPT-2's pre-tokenizer (Radford et al. 2019) in possessive form, as tiktoken has it: splits alike, keeps no stack.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # its \s: Unicode's White_Space


# No match of the split above reaches from a non-space to a space, nor from a letter or digit to another
# kind. A text cut there has the ids of the whole. (Letters and marks here are such in every Unicode.)
CUT = re.compile(rf"[^{SPACE}](?=[ \n])|[A-Za-z0-9а-яぁ-ゖァ-ヺ一-龥가-힣](?=[!-/:-@\[-`{{-~、。，])")


PIECE = 2**18  # characters handed to the tokenizer at once


UNCUT = 2**27  # bytes of memory: the longest stretch without a cut that we hold (1, 2 or 4 a character)


LONG_SPACE = re.compile(f"[{SPACE}]{{4096}}")  # tiktoken 0.14 panics somewhere above 300,000


EIGHT_SPACES = re.compile(f"[{SPACE}]{{8}}")


def pieces(chunks: Iterable[str], size: int = PIECE) -> Iterator[str]:
    """The text of `chunks` cut into pieces of about `size` characters whose ids, joined, are those of the whole.

    Raises UserError where there is no such cut within UNCUT bytes of memory.
    """
    text, scanned = "", 0
    for chunk in chunks:
        text += chunk
        start = 0
        while cut := CUT.search(text, max(start + size - 1, scanned)):
            yield text[start : cut.end()]
            start = cut.end()
        text = text[start:]
        scanned = max(0, len(text) - 1)
        if sys.getsizeof(text) > UNCUT:
            raise UserError(
                f"the text has a stretch of {len(text)} characters without a space or a line break after a word, "
                f"starting {text[:20]!r}; break it up, or prepare with --tokenizer byte"
            )
    if text:
        yield text


def has_long_space(text: str) -> bool:
    """Whether there is a run of 4,096 white spaces: eight in every 512th character, or it need not be looked for."""
    return bool(EIGHT_SPACES.search(text[::512]) and LONG_SPACE.search(text))


def split_like_gpt2(text: str) -> Iterator[re.Match[str]]:
    """GPT2_SPLIT by Python's `re`, whose `\\s+(?!\\S)` takes a run of any length.

    `re` has no \\p{L}: tiktoken itself is asked which of the text's characters are letters and numbers.
    """
    import tiktoken

    single = {bytes([i]): i for i in range(256)}
    classes = []
    for name, sure in (("L", "a"), ("N", "0")):
        matcher = tiktoken.Encoding(name, pat_str=rf"\p{{{name}}}", mergeable_ranks=single, special_tokens={})
        found = bytes(matcher.encode_ordinary("".join(sorted(set(text))))).decode("utf-8")
        classes.append(re.escape(sure + found))
    letter, number = classes
    return re.finditer(
        rf"'(?:[sdmt]|ll|ve|re)| ?[{letter}]++| ?[{number}]++| ?[^{SPACE}{letter}{number}]++"
        rf"|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+",
        text,
    )
