"""Where a text may be cut so that the joined ids of the parts are the ids of the whole.

GPT-2's pre-tokenizer splits a text into words from left to right, and no merge of a BPE crosses a split.
"""

import re
import sys
from collections.abc import Iterable, Iterator

from llm.errors import UserError

# GPT-2's pre-tokenizer (Radford et al. 2019) with possessive quantifiers, as tiktoken has it: the same splits, no stack
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # its \s: Unicode's White_Space


# No match of the split above reaches from a non-space to a space, nor from a letter or digit to another kind of
# character. So a text cut there has the ids of the whole. (These letters and marks are such in every Unicode version.)
CUT = re.compile(rf"[^{SPACE}](?=[ \n])|[A-Za-z0-9а-яぁ-ゖァ-ヺ一-龥가-힣](?=[!-/:-@\[-`{{-~、。，])")


PIECE = 2**18  # characters that the tokenizer gets at once


UNCUT = 2**27  # bytes of memory for a stretch without a cut, at 1, 2 or 4 bytes a character


LONG_SPACE = re.compile(f"[{SPACE}]{{4096}}")  # tiktoken 0.14 panics at a run of spaces somewhere above 300,000


EIGHT_SPACES = re.compile(f"[{SPACE}]{{8}}")


def pieces(chunks: Iterable[str], size: int = PIECE) -> Iterator[str]:
    """Cut the text of `chunks` into pieces of about `size` characters whose joined ids are those of the whole.

    Raises:
        UserError: the text has no such cut within UNCUT bytes of memory.
    """
    text = ""
    scanned = 0  # characters of `text` that hold no cut
    for chunk in chunks:
        text += chunk
        start = 0
        while cut := CUT.search(text, max(start + size - 1, scanned)):
            yield text[start : cut.end()]
            start = cut.end()
        text = text[start:]
        scanned = max(0, len(text) - 1)  # what follows the last character decides whether it ends a piece
        if sys.getsizeof(text) > UNCUT:
            raise UserError(
                f"the text has a stretch of {len(text)} characters without a space or a line break after a word, "
                f"starting {text[:20]!r}; insert spaces, or prepare the text with --tokenizer byte"
            )
    if text:
        yield text


def has_long_space(text: str) -> bool:
    """Whether the text has a run of 4,096 white spaces.

    Such a run puts eight white spaces in a row among every 512th character. That is cheap to check, so most texts
    are not searched.
    """
    return bool(EIGHT_SPACES.search(text[::512]) and LONG_SPACE.search(text))


def split_like_gpt2(text: str) -> Iterator[re.Match[str]]:
    r"""Split a text as GPT2_SPLIT does, by Python's `re`, whose `\s+(?!\S)` matches a run of any length.

    `re` has no \p{L}, so tiktoken says which of the text's characters are letters and numbers.
    """
    characters = "".join(sorted(set(text)))
    letters = re.escape("a" + _characters_of_class("L", characters))
    numbers = re.escape("0" + _characters_of_class("N", characters))
    return re.finditer(
        rf"'(?:[sdmt]|ll|ve|re)| ?[{letters}]++| ?[{numbers}]++| ?[^{SPACE}{letters}{numbers}]++"
        rf"|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+",
        text,
    )


def _characters_of_class(name: str, characters: str) -> str:
    r"""Return those of `characters` that tiktoken's regular expressions match by \p{name}."""
    import tiktoken

    single_bytes = {bytes([i]): i for i in range(256)}
    matcher = tiktoken.Encoding(name, pat_str=rf"\p{{{name}}}", mergeable_ranks=single_bytes, special_tokens={})
    return bytes(matcher.encode_ordinary(characters)).decode("utf-8")
