"""tokenizer.json: a whole tokenizer with the SHA-256 of its content, so that a run needs no network."""

import hashlib
import json
from pathlib import Path
from typing import Any

from llm import storage
from llm.errors import UserError
from llm.tokens.bpe import BPE, GPT2_SHA256, from_printable, hash_names
from llm.tokens.huggingface import HuggingFace
from llm.tokens.tokenizer import Bytes, Characters, Tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write a tokenizer to `path`, with the SHA-256 of its content."""
    content = tokenizer.to_json()
    storage.write_json(path, {"sha256": hash_content(content), **content})


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer saved in `path`.

    Raises:
        UserError: names the file and what is wrong with it.
    """
    try:
        saved = storage.read_json(path)
        tokenizer = from_json(saved)
        if saved.pop("sha256", None) != hash_content(saved):
            raise ValueError("changed since it was written: its SHA-256 differs")
        if saved.get("vocab_size") != tokenizer.vocab_size:
            raise ValueError(f"vocab_size is {saved.get('vocab_size')!r}, but it has {tokenizer.vocab_size} tokens")
        return tokenizer
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a tokenizer that losscurve wrote ({error}); prepare the text again") from None


def hash_content(content: dict[str, Any]) -> str:
    """Return the SHA-256 of a tokenizer's `to_json`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def from_json(saved: Any) -> Tokenizer:
    """Return the tokenizer of a JSON value. Raises ValueError, KeyError, TypeError or UserError."""
    if not isinstance(saved, dict):
        raise ValueError("not a JSON object")
    kind = saved.get("kind")
    if kind == "byte":
        return Bytes()
    if kind == "char":
        return _characters_from_json(saved["characters"])
    if kind in ("bpe", "gpt2"):
        return _bpe_from_json(saved["tokens"], kind)
    if kind == "hf":
        return HuggingFace(saved["content"], saved["end_of_text"])
    raise ValueError(f"kind is {kind!r}: expected gpt2, bpe, byte, char or hf")


def _characters_from_json(characters: Any) -> Characters:
    if not isinstance(characters, str) or not characters or list(characters) != sorted(set(characters)):
        raise ValueError("characters: expected a text of distinct characters, sorted")
    characters.encode("utf-8")  # raises UnicodeEncodeError, a ValueError, for a lone surrogate
    return Characters(characters)


def _bpe_from_json(names: Any, kind: str) -> BPE:
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError("tokens: expected a list of texts")
    tokens = from_printable(names)
    distinct = set(tokens)
    every_byte = {bytes([i]) for i in range(256)}
    if len(distinct) != len(tokens) or not every_byte <= distinct:
        raise ValueError("tokens: expected every byte, and no token twice")
    if kind == "gpt2" and hash_names(names) != GPT2_SHA256:
        raise ValueError("tokens: not those of GPT-2")
    return BPE(tokens, kind)
