"""Start from saved weights: the run takes their shape and tokenizer."""

import dataclasses
from typing import Any

from torch import Tensor

from llm.config import MODEL_FIELDS, GPTConfig, TrainConfig, from_settings
from llm.data import TokenData
from llm.errors import UserError
from llm.prepare.reuse import default_folder
from llm.start.run_folder import Say
from llm.tokens.saved_tokenizer import load_tokenizer
from llm.tokens.token_files import GPT2_VOCAB
from llm.tokens.tokenizer import Tokenizer
from llm.weights import read_weights, weights_file


def check_tokens(config: TrainConfig, data: TokenData, given: Tokenizer | None, tokenizer: Tokenizer | None) -> None:
    """Raise UserError if the tokens of `data` are not those of `given`, the tokenizer of the `init_from` weights."""
    same = given is None or tokenizer is None or given.to_json() == tokenizer.to_json()
    if config.model.vocab_size < data.vocab_size or not same:
        raise UserError(
            f"{data.folder}: its tokens are not those that {config.init_from} was trained on; "
            f"give the text by --text with another --data_dir, and it is prepared with the right ones"
        )


def starting_point(config: TrainConfig, say: Say) -> tuple[TrainConfig, dict[str, Tensor], Tokenizer | None]:
    """Return the config with the shape and tokenizer kind of the weights, the weights, and their tokenizer.

    The tokenizer is None if there is no tokenizer.json beside the weights; GPT-2's is then assumed. Raises UserError if
    the config asks for a size or a tokenizer that the weights do not have.
    """
    source = weights_file(str(config.init_from))
    shape, weights = read_weights(source, config.model)
    for name in MODEL_FIELDS.keys() - {"dropout"}:
        asked, saved = getattr(config.model, name), getattr(shape, name)
        if asked not in (saved, getattr(GPTConfig(), name)):
            raise UserError(f"{name} = {asked}: the weights of {config.init_from} have {saved}; leave it out")
    given, kind = None, "gpt2"
    if source.with_name("tokenizer.json").exists():
        given = load_tokenizer(source.with_name("tokenizer.json"))
        kind = given.kind
    elif shape.vocab_size < GPT2_VOCAB:
        raise UserError(
            f"{source}: no tokenizer.json beside it says what its {shape.vocab_size} tokens are; give a run"
        )
    else:
        say(f"{source}: no tokenizer.json beside it, so GPT-2's tokens are assumed")
    if config.tokenizer not in ("auto", kind):
        raise UserError(
            f"tokenizer = {config.tokenizer!r}: the weights of {config.init_from} know {kind} tokens; leave it out"
        )
    changes: dict[str, Any] = {"tokenizer": kind}
    if kind in ("bpe", "char") and config.text and config.data_dir is None:  # the same kind may have another vocabulary
        folder = default_folder(dataclasses.replace(config, tokenizer="auto"))
        changes["data_dir"] = f"{folder}-for-{source.resolve().parent.name}"
    model = dataclasses.replace(shape, dropout=config.model.dropout)
    return dataclasses.replace(from_settings(changes, config), model=model), weights, given
