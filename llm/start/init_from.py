"""Start from saved weights: the run takes their shape and tokenizer."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from llm.config import FIELDS, MODEL_FIELDS, GPTConfig, TrainConfig, from_settings, to_settings
from llm.data import TokenData
from llm.errors import UserError
from llm.prepare.reuse import default_folder
from llm.start import fine_tuning
from llm.start.run_folder import Say
from llm.tokens.tokenizer import Tokenizer
from llm.weights import open_weights
from llm.weights.opened import Opened


def check_tokens(
    config: TrainConfig, data: TokenData, given: Tokenizer | None, tokenizer: Tokenizer | None, weights: str
) -> None:
    """Raise UserError if the tokens of `data` are not those of `given`, which the named weights have."""
    if config.model.vocab_size < data.vocab_size or not may_be_same(given, tokenizer):
        raise other_tokens(data.folder, weights)


def may_be_same(one: Tokenizer | None, other: Tokenizer | None) -> bool:
    """Return whether two tokenizers are the same, as far as both are known."""
    return one is None or other is None or one.to_json() == other.to_json()


def other_tokens(folder: Path, weights: str) -> UserError:
    """Return the error for token files in `folder` that are not those of the `weights`."""
    return UserError(
        f"{folder}: its tokens are not those that {weights} was trained on; give the text by --text with another "
        "--data_dir, and it is prepared with the right ones"
    )


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run takes from the weights that it starts from."""

    config: TrainConfig  # with their shape and the kind of their tokenizer
    weights: dict[str, Tensor]
    tokenizer: Tokenizer | None  # None: GPT-2's is assumed
    is_pretrained: bool  # by another program: settings that are not given are those of llm.start.fine_tuning


def starting_point(config: TrainConfig, say: Say, given: Collection[str]) -> Start:
    """Return the config with the shape and tokenizer kind of the weights of `init_from`, and the weights.

    `given` are the names of the settings that the user gave. The context may be shorter than that of the weights.
    Raises UserError if a given size or tokenizer is not theirs.
    """
    opened = open_weights(str(config.init_from), config.model)
    shape, weights = opened.config, opened.weights
    _check_shape(config, shape, given)
    changes = token_settings(config, opened, str(config.init_from), say)
    if opened.is_pretrained:
        changes |= fine_tuning.settings(shape, given)
    block_size = changes.pop("block_size", config.model.block_size if "block_size" in given else shape.block_size)
    model = dataclasses.replace(shape, dropout=config.model.dropout, block_size=block_size)
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][:block_size]
    config = dataclasses.replace(from_settings(changes, config), model=model)
    return Start(config, weights, opened.tokenizer, opened.is_pretrained)


def token_settings(config: TrainConfig, opened: Opened, name: str, say: Say) -> dict[str, Any]:
    """Return the settings of the token files that weights can read: their `tokenizer`, and `data_dir` if it is needed.

    `name`: of the weights. Raises UserError if the config asks for another tokenizer.
    """
    kind = "gpt2"
    if opened.tokenizer is not None:
        kind = opened.tokenizer.kind
    else:
        say(f"{opened.path}: no tokenizer.json beside it, so GPT-2's tokens are assumed")
    if config.tokenizer not in ("auto", kind):
        raise UserError(f"tokenizer = {config.tokenizer!r}: the weights of {name} know {kind} tokens; leave it out")
    changes = {"tokenizer": kind}
    if kind in ("bpe", "char", "hf") and config.text and config.data_dir is None:  # of one kind, but not the same
        folder = default_folder(dataclasses.replace(config, tokenizer="auto"))
        place = opened.path.resolve()
        is_named_alike = place.suffix == ".pt" or opened.is_ours  # as in other runs: model.pt, step-000500
        name = place.parent.name if is_named_alike else place.name
        changes["data_dir"] = f"{folder}-for-{name}"
    return changes


def changed_settings(config: TrainConfig) -> set[str]:
    """Return the names of the settings that differ from the chapter's."""
    defaults = to_settings(TrainConfig())
    return {name for name, value in to_settings(config).items() if value != defaults.get(name, FIELDS[name].default)}


def _check_shape(config: TrainConfig, shape: GPTConfig, given: Collection[str]) -> None:
    for name in MODEL_FIELDS.keys() - {"dropout"}:
        asked, saved = getattr(config.model, name), getattr(shape, name)
        if name not in given or asked == saved or (name == "block_size" and asked < saved):
            continue
        raise UserError(f"{name} = {asked}: the weights of {config.init_from} have {saved}; leave it out")
