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
from llm.tokens.tokenizer import END_OF_TEXT, Ids, _Tokens, _utf8

BPE_VOCAB_SIZE = 4096  # default of a trained BPE


VOCAB_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"


VOCAB_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


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
