"""The architectures by their names: what `--arch` means."""

from llm.config import GPTConfig
from llm.llama import Llama
from llm.model import GPT

Model = GPT | Llama


def make_model(config: GPTConfig) -> Model:
    """Return a new model, with weights drawn from torch's own generator."""
    return Llama(config) if config.arch == "llama" else GPT(config)
