"""Text to ids and back: what every tokenizer does, and those by byte and by character.

Every tokenizer is a list of tokens (bytes); an id is a place in the list. Ordinary text never produces the end-of-text
token.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llm.errors import UserError

Ids = npt.NDArray[Any]  # integers, one dimension


END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """What everything else knows of a tokenizer."""

    @property
    def kind(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_text(self) -> int | None: ...
    def encode(self, text: str) -> Ids:
        """The ids of `text`; UserError if it holds a lone surrogate or, for `char`, an unseen character."""

    def decode_bytes(self, ids: Sequence[int] | Ids) -> bytes:
        """The bytes of `ids`; an id outside the vocabulary becomes U+FFFD."""

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """`decode_bytes` as text, with U+FFFD for what is not UTF-8."""

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """(V,) length of each token in UTF-8 bytes of text, 0 for end-of-text."""

    def to_json(self) -> dict[str, Any]: ...


class _Tokens:
    """What the tokenizers share: the list of tokens, and the way back from ids."""

    kind: str

    def __init__(self, tokens: list[bytes], end_of_text: int | None) -> None:
        self.tokens, self.end_of_text, self.vocab_size = tokens, end_of_text, len(tokens)

    def decode_bytes(self, ids: Sequence[int] | Ids) -> bytes:
        tokens, size = self.tokens, self.vocab_size
        return b"".join(tokens[i] if 0 <= i < size else b"\xef\xbf\xbd" for i in np.asarray(ids, np.int64).tolist())

    def decode(self, ids: Sequence[int] | Ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> npt.NDArray[np.int64]:
        lengths = np.array([len(token) for token in self.tokens], dtype=np.int64)
        if self.end_of_text is not None:
            lengths[self.end_of_text] = 0
        return lengths


class Bytes(_Tokens):
    """The 256 bytes, and end-of-text as 256."""

    kind = "byte"

    def __init__(self) -> None:
        super().__init__([bytes([i]) for i in range(256)] + [END_OF_TEXT.encode()], end_of_text=256)

    def encode(self, text: str) -> Ids:
        return np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.uint32)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "byte", "vocab_size": 257}


class Characters(_Tokens):
    """The distinct characters of a text, in the order of their code points; no end-of-text."""

    kind = "char"

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = "".join(sorted(set(characters)))
        super().__init__([_utf8(character) for character in self.characters], end_of_text=None)
        points = np.frombuffer(self.characters.encode("utf-32-le"), dtype="<u4")
        self._ids = np.full(int(points.max(initial=0)) + 2, self.vocab_size, dtype=np.uint32)  # by code point
        self._ids[points] = np.arange(self.vocab_size)

    def encode(self, text: str) -> Ids:
        _utf8(text)
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids: Ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        unseen = np.flatnonzero(ids == self.vocab_size)
        if unseen.size:
            place = int(unseen[0])
            raise UserError(
                f"character {text[place]!r} (U+{ord(text[place]):04X}, at position {place}) is not among the "
                f"{self.vocab_size} of this char vocabulary; leave it out, or prepare with --tokenizer byte or bpe"
            )
        return ids

    def to_json(self) -> dict[str, Any]:
        return {"kind": "char", "vocab_size": self.vocab_size, "characters": self.characters}


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}, at position {error.start}), "
            "which is not a character; remove it"
        ) from None
