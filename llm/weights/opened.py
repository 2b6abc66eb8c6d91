"""Weights to go on from, whoever wrote them: of a run, a .pt file, a GGUF file, or a model in Hugging Face's format."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llm import storage
from llm.arch import Model, make_model
from llm.config import GPTConfig
from llm.errors import UserError
from llm.tokens.foreign import characters
from llm.tokens.saved_tokenizer import load_tokenizer
from llm.tokens.token_files import GPT2_VOCAB
from llm.tokens.tokenizer import Tokenizer
from llm.weights.foreign import is_foreign, read_foreign
from llm.weights.from_checkpoint import is_checkpoint, read_checkpoint
from llm.weights.gguf_file import is_gguf, read_gguf
from llm.weights.pt_file import read_weights, weights_file


@dataclass(frozen=True)
class Opened:
    """A model in our terms."""

    path: Path  # the file or folder that holds it
    config: GPTConfig
    weights: dict[str, Tensor]
    tokenizer: Tokenizer | None  # None: nothing beside the weights says; they are GPT-2's tokens then
    is_ours: bool  # from a run folder

    @property
    def is_pretrained(self) -> bool:
        """Whether another program trained the model, or a run did that began with such weights."""
        return not self.is_ours or bool(storage.read_facts(self.path.with_name("env.json")).get("pretrained"))

    def model(self, device: torch.device) -> Model:
        """Return the model in evaluation mode."""
        model = make_model(self.config)
        model.load_state_dict(self.weights)
        return model.to(device).eval()


def open_weights(source: str, base: GPTConfig, preferred: str = "best", typed: Collection[str] = ()) -> Opened:
    """Return the weights of a run, of a checkpoint in it, a .pt or GGUF file, or a model in Hugging Face's format.

    The last is a folder, or a name on the hub.

    Args:
        base: has what a .pt file does not tell: heads and GELU.
        preferred: the weights of a run, "best" or "last"; the others if it has only those. "average" is that of the
            weights in a checkpoint.
        typed: the names of the settings that a person gave. Weights that tell their own heads and GELU refuse them.

    Raises:
        UserError: the weights cannot be used.
        Failure: the hub cannot be read.
    """
    if preferred == "average" and not is_checkpoint(Path(source)):
        raise UserError(
            f"{source}: only a checkpoint (step-000500) has the average of the weights; leave --weights out"
        )
    if (foreign := is_foreign(source)) or is_gguf(Path(source)):
        found = read_foreign(source) if foreign else read_gguf(Path(source))
        path, config, weights, tokenizer, is_ours = found.path, found.config, found.weights, found.tokenizer, False
        tells_heads = True
    else:
        from_checkpoint = is_checkpoint(Path(source))
        path = Path(source) if from_checkpoint else weights_file(source, preferred)
        config, weights = read_checkpoint(path, preferred) if from_checkpoint else read_weights(path, base)
        tokenizer = _tokenizer_beside(path)
        is_ours = path.with_name("config.toml").is_file()
        tells_heads = is_ours or config.n_head != base.n_head  # nanoGPT's file tells them
    if tokenizer is None and config.vocab_size < GPT2_VOCAB:
        raise UserError(
            f"{path}: no tokenizer.json beside it says what its {config.vocab_size} tokens are; put it there"
        )
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{path}: its vocabulary is {config.vocab_size}, and the tokenizer beside it has {tokenizer.vocab_size} "
            "tokens; put the right one there"
        )
    if tells_heads and {"n_head", "gelu"}.intersection(typed):
        raise UserError(f"n_head and gelu are for a bare state_dict; {source} has its own, so leave them out")
    return Opened(path, config, weights, tokenizer, is_ours)


def _tokenizer_beside(path: Path) -> Tokenizer | None:
    """Return the tokenizer beside a .pt file or a checkpoint: a tokenizer.json of ours, or nanoGPT's meta.pkl."""
    saved = path.with_name("tokenizer.json")
    return load_tokenizer(saved) if saved.exists() else characters(path.parent)
