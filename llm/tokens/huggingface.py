"""tokenizer.json of the Hugging Face tokenizers library: ours written as one, and any other read from one.

A tokenizer that this module wrote itself, and GPT-2's own, are read as ours. Every other one whose tokens have known
bytes becomes a `HuggingFace`, which keeps the whole file and lets the library encode.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from llm.errors import UserError
from llm.tokens.bpe import BPE, GPT2_SHA256, from_printable, hash_names, to_printable
from llm.tokens.merges import merges
from llm.tokens.tokenizer import END_OF_TEXT, Bytes, Characters, Ids, Tokenizer, TokenList, encode_utf8

LARGEST_VOCAB = 2**20
SPACE = "\u2581"  # SentencePiece's sign for a space
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's name of a byte
# parts of a pre_tokenizer that begins each text that it is given with a space
SPACE_BEFORE = ('"add_prefix_space": true', '"prepend_scheme": "first"', '"prepend_scheme": "always"')


class HuggingFace(TokenList):
    """A tokenizer of another program. Its special tokens are ids that ordinary text never encodes to.

    `is_lossless` is False if it normalises a text or puts a space before it, so that the bytes of the tokens are not
    those of the text.
    """

    kind = "hf"

    def __init__(self, content: str, end_of_text: int | None) -> None:
        """Raises ValueError if `content` is not a tokenizer.json, or does not tell the bytes of its tokens."""
        from tokenizers import Tokenizer as Library

        try:
            self._library = Library.from_str(content)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"not a tokenizer.json ({error})") from None
        self._library.encode_special_tokens = True  # no special token from what looks like one in a text
        self._library.no_truncation()
        self._library.no_padding()
        self.content = content
        description = json.loads(content)
        super().__init__(_bytes_of_tokens(self._library.get_vocab(), description), end_of_text)
        if end_of_text is not None and not 0 <= end_of_text < self.vocab_size:
            raise ValueError(f"end_of_text is {end_of_text}, and it has {self.vocab_size} tokens")
        splitter = json.dumps(description.get("pre_tokenizer"))
        self.is_lossless = description.get("normalizer") is None and not any(part in splitter for part in SPACE_BEFORE)

    def encode(self, text: str) -> Ids:
        encode_utf8(text)  # raises UserError for a lone surrogate
        try:
            return np.array(self._library.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
        except Exception as error:  # such as a character outside a vocabulary without an unknown token
            raise UserError(
                f"the tokenizer cannot encode {text[:40]!r} ({error}); remove what it does not know"
            ) from None

    def to_json(self) -> dict[str, Any]:
        facts = {"kind": self.kind, "vocab_size": self.vocab_size, "end_of_text": self.end_of_text}
        return facts | {"content": self.content}


def _bytes_of_tokens(vocabulary: dict[str, int], description: dict[str, Any]) -> list[bytes]:
    """Return the bytes of each token, b"" for an id without one. Raises ValueError if they are not known."""
    if not vocabulary or max(vocabulary.values()) >= LARGEST_VOCAB:
        raise ValueError(f"expected a vocabulary of 1 to {LARGEST_VOCAB:,} tokens")
    words = json.dumps(
        [description.get(name) for name in ("pre_tokenizer", "decoder", "normalizer")], ensure_ascii=False
    )
    if '"ByteLevel"' in words:
        bytes_of = _read_byte_level(vocabulary)
    elif SPACE in words:
        bytes_of = {name: _read_sentencepiece(name) for name in vocabulary}
    elif description.get("model", {}).get("type") == "WordLevel" and '"Fuse"' in words:
        bytes_of = {name: name.encode() for name in vocabulary}
    else:
        raise ValueError("it is neither byte-level nor SentencePiece's, so the bytes of its tokens are not known")
    for added in description.get("added_tokens", []):
        bytes_of[added["content"]] = added["content"].encode()
    tokens = [b""] * (max(vocabulary.values()) + 1)
    for name, i in vocabulary.items():
        tokens[i] = bytes_of[name]
    return tokens


def _read_byte_level(names: Iterable[str]) -> dict[str, bytes]:
    """Return the bytes of tokens in GPT-2's printable alphabet; other names, such as one of padding, are plain text."""
    alphabet = set(to_printable(bytes([i]) for i in range(256)))
    printable = [name for name in names if alphabet.issuperset(name)]
    return {name: name.encode() for name in names} | dict(zip(printable, from_printable(printable), strict=True))


def _read_sentencepiece(name: str) -> bytes:
    byte = BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace(SPACE, " ").encode()


# ---- ours as a tokenizer.json, and back


def write(tokenizer: Tokenizer) -> str:
    """Return the tokenizer.json of a tokenizer. The library encodes as it does: every id of every text is the same."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    if isinstance(tokenizer, HuggingFace):
        return tokenizer.content
    if isinstance(tokenizer, Characters):
        library = Library(models.WordLevel({character: i for i, character in enumerate(tokenizer.characters)}, "<unk>"))
        library.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        library.decoder = decoders.Fuse()
        return str(library.to_str(pretty=True))
    assert isinstance(tokenizer, (BPE, Bytes))
    vocabulary = {name: i for i, name in enumerate(to_printable(tokenizer.tokens[:-1]))}
    library = Library(models.BPE(vocabulary, merges(tokenizer) if isinstance(tokenizer, BPE) else []))
    splits = isinstance(tokenizer, BPE)  # into GPT-2's words
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return str(library.to_str(pretty=True))


def read(content: str, end_of_text: str | None) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json: one of ours if it is that, else a `HuggingFace`.

    `end_of_text` is the name of the token between two documents, None if nothing names it, as beside GPT-2's own file.
    Raises ValueError for what is none, or has no such token.
    """
    try:
        description = json.loads(content)
        tokenizer = _ours(description)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a tokenizer.json ({type(error).__name__}: {error})") from None
    if tokenizer is not None and (tokenizer.end_of_text is not None or end_of_text is None):
        return tokenizer
    found = HuggingFace(content, None)
    if end_of_text is not None:
        ids = [i for i, token in enumerate(found.tokens) if token == end_of_text.encode()]
        if not ids:
            raise ValueError(f"it has no token {end_of_text!r}, which tokenizer_config.json names as its eos_token")
        found.end_of_text = ids[-1]
    return found


def _ours(description: dict[str, Any]) -> Tokenizer | None:
    """Return the tokenizer of ours that would be written as this description, None if there is none."""
    model, added = description["model"], description["added_tokens"]
    kind = model.get("type", "BPE" if "merges" in model else None)  # GPT-2's own file names no type
    if kind not in ("WordLevel", "BPE"):
        return None
    names = sorted(model["vocab"], key=model["vocab"].__getitem__)
    if list(map(model["vocab"].__getitem__, names)) != list(range(len(names))):
        return None
    found: Tokenizer
    if kind == "WordLevel" and not added:
        if any(len(name) != 1 for name in names) or names != sorted(names):
            return None
        found = Characters(names)
    elif kind == "BPE" and [token["content"] for token in added] == [END_OF_TEXT]:
        names = [name for name in names if name != END_OF_TEXT]  # GPT-2's own file has it in the vocabulary too
        if hash_names(names) == GPT2_SHA256:
            return BPE(from_printable(names), "gpt2") if _splits_like_gpt2(description) else None
        tokens = _read_byte_level(names)
        if not {bytes([i]) for i in range(256)} <= set(tokens.values()):
            return None
        found = BPE([tokens[name] for name in names]) if model["merges"] else Bytes()
    else:
        return None
    return found if _encoding_of(json.loads(write(found))) == _encoding_of(description) else None


def _encoding_of(description: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a tokenizer.json that decide the ids of a text: `HuggingFace.encode` asks for no others.

    transformers adds a post-processor, truncation or padding when it saves a tokenizer.
    """
    return {name: part for name, part in description.items() if name not in ("post_processor", "truncation", "padding")}


def _splits_like_gpt2(description: dict[str, Any]) -> bool:
    splitter = description["pre_tokenizer"]
    plain = (splitter["type"], splitter["add_prefix_space"], splitter.get("use_regex", True))
    return plain == ("ByteLevel", False, True) and description["normalizer"] is None
