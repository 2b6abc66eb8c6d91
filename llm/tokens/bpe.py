"""Byte-level BPE with GPT-2's pre-tokenizer: GPT-2's own vocabulary, or one trained on the text."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llm import storage
from llm.errors import UserError
from llm.storage import download
from llm.tokens.cut import GPT2_SPLIT, PIECE, has_long_space, pieces, split_like_gpt2
from llm.tokens.tokenizer import END_OF_TEXT, Ids, TokenList, encode_utf8

BPE_VOCAB_SIZE = 4096  # default of a trained BPE


VOCAB_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"


VOCAB_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


GPT2_SHA256 = "3a1f1c010d179f036be1992bc14b861e326341438633869c694dc4dccfe153d3"  # of its tokens, as we save them


SMALLEST_VOCAB = 257  # the bytes and end-of-text


LARGEST_VOCAB = 2**20


LONG_WORD = 2**16  # bytes: a longer pre-token is merged window by window


class BPE(TokenList):
    """Byte-level BPE with GPT-2's pre-tokenizer: of all adjacent pairs that form a token, the lowest id merges first.

    `tokens` are in the order of their merges, without end-of-text, which becomes the last id.
    `kind` is "gpt2" or "bpe".
    """

    def __init__(self, tokens: list[bytes], kind: str = "bpe") -> None:
        import tiktoken

        self.kind = kind
        end_of_text = len(tokens)
        super().__init__([*tokens, END_OF_TEXT.encode()], end_of_text)
        self._encoding = tiktoken.Encoding(
            kind,
            pat_str=GPT2_SPLIT,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens={END_OF_TEXT: end_of_text},
        )
        # tiktoken caches per-thread state; warm it up here, or worker threads run at half speed
        self._encoding.encode_ordinary("a")
        self._longest = max(map(len, tokens))  # bytes
        self._dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, text: str) -> Ids:
        encode_utf8(text)  # raises UserError for a lone surrogate, which tiktoken would replace silently
        parts: list[Ids] = []
        for piece in pieces([text]):
            if len(piece) > 4 * PIECE or has_long_space(piece):
                parts.extend(self._encode_slowly(piece))
            else:
                parts.append(self._encoding.encode_to_numpy(piece, disallowed_special=()).astype(self._dtype))
        if not parts:
            return np.zeros(0, self._dtype)
        return np.concatenate(parts)

    def _encode_slowly(self, text: str) -> Iterator[Ids]:
        """Yield the ids of a text that tiktoken's regular expression cannot handle, in bounded memory."""
        pending: list[int] = []
        for match in split_like_gpt2(text):
            word = match.group().encode("utf-8")
            is_long = len(word) >= LONG_WORD
            if not is_long:
                pending.extend(self._encoding._encode_single_piece(word))
            if pending and (is_long or len(pending) > 2**16):
                yield np.array(pending, self._dtype)
                pending = []
            if is_long:
                yield from self._merge_long(word)
        yield np.array(pending, self._dtype)

    def _merge_long(self, word: bytes) -> Iterator[Ids]:
        """Yield the ids of one long pre-token, window by window.

        Merges are local: a sequence of tokens is the BPE of its bytes if and only if every two neighbours are the
        BPE of theirs. So if a window starts at a token of the window before, and its own first token is that same
        token, the two sequences join into the sequence of the whole.
        """
        merge = self._encoding._encode_single_piece
        lengths = np.array([len(token) for token in self.tokens])
        window = max(2**16, 64 * self._longest)  # bytes that each window adds
        ids: Ids = np.zeros(0, self._dtype)  # of the last window
        start = 0  # first byte of the last window
        end = 0  # byte after the last window
        while end < len(word):
            stop = end + window
            overlap = 16 * self._longest
            starts = start + np.cumsum(lengths[ids]) - lengths[ids]  # first byte of each token of the last window
            while True:
                keep = int(np.searchsorted(starts, end - overlap))  # the first token that starts in the overlap
                begin = int(starts[keep]) if keep < len(ids) else start
                following = np.array(merge(word[begin:stop]), self._dtype)
                if begin == start or following[0] == ids[keep]:
                    break
                overlap *= 2
            yield ids[: keep if begin > start else 0]
            ids = following
            start = begin
            end = min(stop, len(word))
        yield ids

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "vocab_size": self.vocab_size, "tokens": to_printable(self.tokens[:-1])}


def _byte_alphabet() -> dict[int, str]:
    """Return GPT-2's printable character for each byte, as in its vocabulary files; in the order of its first ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable}
    for number, byte in enumerate(others):
        alphabet[byte] = chr(256 + number)
    return alphabet


def to_printable(tokens: Iterable[bytes]) -> list[str]:
    """Return the tokens in GPT-2's printable alphabet."""
    alphabet = _byte_alphabet()
    return ["".join(alphabet[byte] for byte in token) for token in tokens]


def from_printable(names: Iterable[str]) -> list[bytes]:
    """Return the tokens of names in GPT-2's printable alphabet: the inverse of `to_printable`.

    Raises:
        KeyError: a character is not in the alphabet.
    """
    byte_of = {character: byte for byte, character in _byte_alphabet().items()}
    return [bytes(byte_of[character] for character in name) for name in names]


def hash_names(names: list[str]) -> str:
    """Return the SHA-256 of a list of tokens in GPT-2's printable alphabet."""
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogatepass")).hexdigest()


def gpt2(offline: bool = False) -> BPE:
    """Return GPT-2's tokenizer; its vocabulary is read from the cache or downloaded.

    The cache is tiktoken's: TIKTOKEN_CACHE_DIR, or `tiktoken/` in our cache folder.

    Raises:
        Failure: the vocabulary cannot be downloaded.
    """
    folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or storage.cache_folder() / "tiktoken")
    path = folder / hashlib.sha1(VOCAB_URL.encode()).hexdigest()  # tiktoken's name for the file
    download.fetch(VOCAB_URL, path, VOCAB_SHA256, "GPT-2's vocabulary", offline)
    merges = path.read_text(encoding="utf-8").split("\n")[1:-1]  # after the line with the version, one merge a line
    single_bytes = _byte_alphabet().values()
    merged = [merge.replace(" ", "") for merge in merges]
    return BPE(from_printable([*single_bytes, *merged]), "gpt2")


def train_bpe(text: Iterable[str], vocab_size: int = BPE_VOCAB_SIZE) -> BPE:
    """Train a BPE of at most `vocab_size` tokens, end-of-text included, on `text`, given in chunks.

    Raises:
        UserError: `vocab_size` is out of its bounds.
    """
    if not SMALLEST_VOCAB <= vocab_size <= LARGEST_VOCAB:
        raise UserError(
            f"vocab_size = {vocab_size}: expected {SMALLEST_VOCAB} (the bytes and end-of-text) to {LARGEST_VOCAB} "
            "for a bpe"
        )
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=64,  # no token is a whole line of dashes
        show_progress=False,
    )
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    model.train_from_iterator(_training_lines(text), trainer)
    vocabulary = model.get_vocab()
    return BPE(from_printable(sorted(vocabulary, key=vocabulary.__getitem__)))


def _training_lines(text: Iterable[str]) -> Iterator[str]:
    """Yield the text in lines of at most 2**14 characters.

    A longer stretch without spaces is cut anywhere: the trainer learns nothing from it, and takes longer the longer
    it is.
    """
    for piece in pieces(text, 2**12):
        for start in range(0, len(piece), 2**14):
            yield piece[start : start + 2**14]
