"""The settings of a preparation, checked, as meta.json records them."""

import json
from typing import Any

from llm.config import from_settings
from llm.errors import UserError
from llm.text import hub
from llm.text.rows import FIELD

# What is written into meta.json, state.json or tokenizer.json is bounded here, far below what storage reads of a file

NAMES = 8 * 2**20  # bytes of the names of texts


SMALLEST_BPE = 257  # tokens in the vocabulary: the bytes and end-of-text


LARGEST_BPE = 1_000_000


def check_settings(
    text: tuple[str, ...],
    tokenizer: str,
    vocab_size: int | None,
    val_fraction: float,
    text_limit: int | None,
    text_field: str | None,
) -> dict[str, Any]:
    """Check the settings of a preparation and return them as meta.json records them.

    Raises:
        UserError: names a setting that is out of its bounds, or that does not suit the text.
    """
    settings: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": vocab_size, "val_fraction": val_fraction}
    from_settings(settings | {"text_limit": text_limit, "text_field": text_field})
    if tokenizer == "bpe" and vocab_size is not None:
        _check_bpe_size(vocab_size)
    names_bytes = len(json.dumps(text))
    if names_bytes > NAMES:
        raise UserError(
            f"text: the names of its {len(text)} files take {names_bytes // 2**20} MiB; put the files into a folder, "
            "and name the folder"
        )
    if text_limit is not None and not any(word in hub.TEXTS for word in text):
        raise UserError(f"text_limit = {text_limit}: is for {' and '.join(hub.TEXTS)}; other texts are read whole")
    # The two newer settings are recorded only if they are used: a meta.json of an older version has neither
    if text_field not in (None, FIELD):
        settings["text_field"] = text_field
    if text_limit is not None:
        settings["text_limit"] = text_limit
    return {"text": list(text), **settings}


def _check_bpe_size(vocab_size: int) -> None:
    if vocab_size < SMALLEST_BPE:
        raise UserError(
            f"vocab_size = {vocab_size}: a bpe has at least {SMALLEST_BPE} tokens, the 256 bytes and end-of-text"
        )
    if vocab_size > LARGEST_BPE:
        raise UserError(f"vocab_size = {vocab_size}: a bpe has at most {LARGEST_BPE} tokens")
