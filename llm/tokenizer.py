"""Text to ids and back: GPT-2's BPE, a BPE trained on the text, bytes, characters.

Every tokenizer is a list of tokens (bytes), the id being the place in the list, and saves itself whole
as JSON, so that a run needs no network. Ordinary text never produces the end-of-text token.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llm import download, storage
from llm.cut import GPT2_SPLIT, PIECE, has_long_space, pieces, split_like_gpt2
from llm.errors import UserError

Ids = npt.NDArray[Any]  # integers, one dimension

END_OF_TEXT = "<|endoftext|>"
BPE_VOCAB_SIZE = 4096  # default of a trained BPE
VOCAB_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
VOCAB_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_SHA256 = "3a1f1c010d179f036be1992bc14b861e326341438633869c694dc4dccfe153d3"  # of the tokens as we save them


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


class BPE(_Tokens):
    """Byte-level BPE with GPT-2's pre-tokenizer: of all adjacent pairs that make a token, the lowest id first.

    `tokens` are in the order of their merges, end-of-text not among them: it becomes the last id.
    `kind` is "gpt2" or "bpe".
    """

    def __init__(self, tokens: list[bytes], kind: str = "bpe") -> None:
        import tiktoken

        self.kind = kind
        ranks = {token: rank for rank, token in enumerate(tokens)}
        special = {END_OF_TEXT: len(tokens)}
        super().__init__([*tokens, END_OF_TEXT.encode()], end_of_text=len(tokens))
        self._encoding = tiktoken.Encoding(kind, pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens=special)
        # what tokenizes first keeps a fast way for its thread; if that is one of many, the others take twice the time
        self._encoding.encode_ordinary("a")
        self._longest = max(map(len, tokens))
        self._dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, text: str) -> Ids:
        _utf8(text)  # tiktoken would replace lone surrogates without a word
        parts: list[Ids] = []
        for piece in pieces([text]):
            if len(piece) > 4 * PIECE or has_long_space(piece):
                parts.extend(self._encode_slowly(piece))
            else:
                parts.append(self._encoding.encode_to_numpy(piece, disallowed_special=()).astype(self._dtype))
        return np.concatenate(parts) if parts else np.zeros(0, self._dtype)

    def _encode_slowly(self, text: str) -> Iterator[Ids]:
        """The ids of a text that would be too much for tiktoken's regular expression, in bounded memory."""
        short: list[int] = []
        for match in split_like_gpt2(text):
            piece = match.group().encode("utf-8")
            if len(piece) < 2**16:
                short.extend(self._encoding._encode_single_piece(piece))
            if short and (len(piece) >= 2**16 or len(short) > 2**16):
                yield np.array(short, self._dtype)
                short = []
            if len(piece) >= 2**16:
                yield from self._merge_long(piece)
        yield np.array(short, self._dtype)

    def _merge_long(self, piece: bytes) -> Iterator[Ids]:
        """The ids of one long pre-token, window by window.

        Merges are local: a row of tokens is the BPE of its bytes if and only if every two neighbours are the
        BPE of theirs. So where the window that starts at a token of the window before has that same
        token first, the two rows join into the row of the whole.
        """
        merge = self._encoding._encode_single_piece
        lengths = np.array([len(token) for token in self.tokens])
        window, start, end = max(2**16, 64 * self._longest), 0, 0
        ids: Ids = np.zeros(0, self._dtype)
        while end < len(piece):
            stop, back = end + window, 16 * self._longest
            starts = start + np.cumsum(lengths[ids]) - lengths[ids]
            while True:
                keep = int(np.searchsorted(starts, end - back))  # the first token that starts in the last `back` bytes
                begin = int(starts[keep]) if keep < len(ids) else start
                following = np.array(merge(piece[begin:stop]), self._dtype)
                if begin == start or following[0] == ids[keep]:
                    break
                back *= 2
            yield ids[: keep if begin > start else 0]
            ids, start, end = following, begin, min(stop, len(piece))
        yield ids

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "vocab_size": self.vocab_size, "tokens": _printable(self.tokens[:-1])}


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}, at position {error.start}), "
            "which is not a character; remove it"
        ) from None


def _alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte, as in its vocabulary files; in the order of its first 256 ids."""
    themselves = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in themselves]
    return {byte: chr(byte) for byte in themselves} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _printable(tokens: Iterable[bytes]) -> list[str]:
    alphabet = _alphabet()
    return ["".join(alphabet[byte] for byte in token) for token in tokens]


def _raw(tokens: Iterable[str]) -> list[bytes]:
    """The inverse of `_printable`. Raises KeyError."""
    byte_of = {character: byte for byte, character in _alphabet().items()}
    return [bytes(byte_of[character] for character in token) for token in tokens]


def gpt2(offline: bool = False) -> BPE:
    """GPT-2's tokenizer; its vocabulary from the cache or the network.

    Kept where tiktoken keeps it: TIKTOKEN_CACHE_DIR, or `tiktoken/` in our cache folder. Raises Failure.
    """
    folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or storage.cache_folder() / "tiktoken")
    path = folder / hashlib.sha1(VOCAB_URL.encode()).hexdigest()  # tiktoken's name for it
    download.fetch(VOCAB_URL, path, VOCAB_SHA256, "GPT-2's vocabulary", offline)
    merges = path.read_text(encoding="utf-8").split("\n")[1:-1]  # a line of version, then a merge a line
    return BPE(_raw([*_alphabet().values(), *(merge.replace(" ", "") for merge in merges)]), "gpt2")


def train_bpe(text: Iterable[str], vocab_size: int = BPE_VOCAB_SIZE) -> BPE:
    """A BPE of at most `vocab_size` tokens (end-of-text included) trained on `text`, given in chunks."""
    if not 257 <= vocab_size <= 2**20:
        raise UserError(f"vocab_size = {vocab_size}: a bpe needs 257 (the bytes and end-of-text) to {2**20}")
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=64,  # no token that is a whole ruler of dashes
        show_progress=False,
    )
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # a stretch without spaces is cut anywhere here: it teaches nothing, and the trainer's time grows with it
    lines = (piece[i : i + 2**14] for piece in pieces(text, 2**12) for i in range(0, len(piece), 2**14))
    model.train_from_iterator(lines, trainer)
    return BPE(_raw(sorted(model.get_vocab(), key=model.get_vocab().__getitem__)))


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write `path`, with the SHA-256 of what is in it."""
    content = tokenizer.to_json()
    storage.write_json(path, {"sha256": _content_sha256(content), **content})


def _content_sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer saved in `path`. Raises UserError naming the file and what is wrong with it."""
    try:
        saved = storage.read_json(path)
        tokenizer = _from_json(saved)
        if saved.pop("sha256", None) != _content_sha256(saved):
            raise ValueError("changed since it was written: its SHA-256 differs")
        if saved.get("vocab_size") != tokenizer.vocab_size:
            raise ValueError(f"vocab_size is {saved.get('vocab_size')!r}, but it has {tokenizer.vocab_size} tokens")
        return tokenizer
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a tokenizer of ours ({error}); prepare the text again") from None


def _from_json(saved: Any) -> Tokenizer:
    """Raises ValueError, KeyError, TypeError or UserError."""
    if not isinstance(saved, dict):
        raise ValueError("no JSON object")
    kind = saved.get("kind")
    if kind == "byte":
        return Bytes()
    if kind == "char":
        characters = saved["characters"]
        if not isinstance(characters, str) or not characters or list(characters) != sorted(set(characters)):
            raise ValueError("characters: expected a text of distinct characters, sorted")
        characters.encode("utf-8")  # a lone surrogate is a ValueError too
        return Characters(characters)
    if kind in ("bpe", "gpt2"):
        names = saved["tokens"]
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise ValueError("tokens: expected a list of texts")
        tokens = _raw(names)
        if len(set(tokens)) != len(tokens) or not {bytes([i]) for i in range(256)} <= set(tokens):
            raise ValueError("tokens: expected every byte, and nothing twice")
        if kind == "gpt2" and _sha256(names) != GPT2_SHA256:
            raise ValueError("tokens: not those of GPT-2")
        return BPE(tokens, kind)
    raise ValueError(f"kind is {kind!r}: expected gpt2, bpe, byte or char")


def _sha256(names: list[str]) -> str:
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogatepass")).hexdigest()
