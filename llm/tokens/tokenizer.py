"""Text to ids and back: the interface of every tokenizer, and the tokenizers by byte and by character.

A tokenizer is a list of tokens (bytes); an id is an index into the list. Ordinary text never encodes to the
end-of-text token.

Shapes: `V` vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llm.errors import UserError

Ids = npt.NDArray[Any]  # integers, one dimension


END_OF_TEXT = "<|endoftext|>"


REPLACEMENT = "\ufffd".encode()  # decoded from an id outside the vocabulary


class Tokenizer(Protocol):
    """The interface of every tokenizer."""

    @property
    def kind(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_text(self) -> int | None: ...
    @property
    def is_lossless(self) -> bool: ...
    def encode(self, text: str) -> Ids:
        """Return the ids of `text`.

        Raises:
            UserError: the text holds a lone surrogate or, for `char`, a character outside the vocabulary.
        """

    def decode_bytes(self, ids: Sequence[int] | Ids) -> bytes:
        """Return the bytes of `ids`; an id outside the vocabulary becomes U+FFFD."""

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Return `decode_bytes` as text, with U+FFFD for bytes that are not UTF-8."""

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Return the length (V,) of each token in UTF-8 bytes of text, 0 for end-of-text."""

    def to_json(self) -> dict[str, Any]: ...


class TokenList:
    """The part that all tokenizers share: the list of tokens, and decoding."""

    kind: str
    is_lossless = True  # decoding the ids of a text gives exactly that text

    def __init__(self, tokens: list[bytes], end_of_text: int | None) -> None:
        self.tokens = tokens
        self.end_of_text = end_of_text
        self.vocab_size = len(tokens)

    def decode_bytes(self, ids: Sequence[int] | Ids) -> bytes:
        tokens = self.tokens
        size = self.vocab_size
        indices = np.asarray(ids, np.int64).tolist()
        return b"".join(tokens[i] if 0 <= i < size else REPLACEMENT for i in indices)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> npt.NDArray[np.int64]:
        lengths = np.array([len(token) for token in self.tokens], dtype=np.int64)
        if self.end_of_text is not None:
            lengths[self.end_of_text] = 0
        return lengths


class Bytes(TokenList):
    """The 256 bytes, and end-of-text as id 256."""

    kind = "byte"

    def __init__(self) -> None:
        single_bytes = [bytes([i]) for i in range(256)]
        super().__init__([*single_bytes, END_OF_TEXT.encode()], end_of_text=256)

    def encode(self, text: str) -> Ids:
        return np.frombuffer(encode_utf8(text), dtype=np.uint8).astype(np.uint32)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "byte", "vocab_size": 257}


class Characters(TokenList):
    """The distinct characters of a text, in the order of their code points; without end-of-text."""

    kind = "char"

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = "".join(sorted(set(characters)))
        super().__init__([encode_utf8(character) for character in self.characters], end_of_text=None)
        points = _code_points(self.characters)
        largest = int(points.max(initial=0))
        # id by code point; vocab_size marks a character outside the vocabulary, as does the last entry
        self._ids = np.full(largest + 2, self.vocab_size, dtype=np.uint32)
        self._ids[points] = np.arange(self.vocab_size)

    def encode(self, text: str) -> Ids:
        encode_utf8(text)  # raises UserError for a lone surrogate
        points = _code_points(text)
        ids: Ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        unknown = np.flatnonzero(ids == self.vocab_size)
        if unknown.size:
            place = int(unknown[0])
            raise UserError(
                f"character {text[place]!r} (U+{ord(text[place]):04X}) is not in the vocabulary "
                f"of {self.vocab_size} characters; remove it, or use the tokenizer byte or bpe"
            )
        return ids

    def to_json(self) -> dict[str, Any]:
        return {"kind": "char", "vocab_size": self.vocab_size, "characters": self.characters}


def first_readable(tokenizer: Tokenizer, prompts: Iterable[str]) -> str | None:
    """Return the first of `prompts` that the tokenizer can encode, None if there is none."""
    for prompt in prompts:
        try:
            tokenizer.encode(prompt)
            return prompt
        except UserError:  # a character that is not in the vocabulary
            continue
    return None


def encode_prompt(tokenizer: Tokenizer, prompt: str, label: str = "prompt") -> Ids:
    """Return the ids of a prompt. Raises UserError, which calls it `label`, if it cannot be encoded or has no token."""
    try:
        ids = tokenizer.encode(prompt)
    except UserError as error:
        cause = str(error).partition(";")[0]  # the rest is for texts to train on
        raise UserError(f"{label}: {cause}; remove it, since this model can read no other characters") from None
    if not len(ids):
        raise UserError(f"{label}: holds no token; give at least one character")
    return ids


def encode_utf8(text: str) -> bytes:
    """Return the UTF-8 of `text`.

    Raises:
        UserError: the text holds a lone surrogate.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}, at position {error.start}), "
            "which is not a character; remove it"
        ) from None


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
