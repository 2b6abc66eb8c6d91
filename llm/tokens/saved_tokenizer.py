"""tokenizer.json: a tokenizer saved whole, with the SHA-256 of its content, so that a run needs no network."""

import hashlib
import json
from pathlib import Path
from typing import Any

from llm import storage
from llm.errors import UserError
from llm.tokens.bpe import BPE, _raw
from llm.tokens.tokenizer import Bytes, Characters, Tokenizer

GPT2_SHA256 = "3a1f1c010d179f036be1992bc14b861e326341438633869c694dc4dccfe153d3"  # of the tokens as we save them


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
