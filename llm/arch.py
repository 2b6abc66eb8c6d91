"""The architectures by their names: what `--arch` means."""

from typing import Any

import torch
from torch import Size
from torch.overrides import TorchFunctionMode

from llm.config import GPTConfig
from llm.llama import Llama
from llm.model import GPT

Model = GPT | Llama


def make_model(config: GPTConfig) -> Model:
    """Return a new model, with weights drawn from torch's own generator."""
    return Llama(config) if config.arch == "llama" else GPT(config)


def empty_model(config: GPTConfig) -> Model:
    """Return a model on the meta device, for the names and shapes of its tensors: they have no values and no memory."""
    with _WithoutInitialising(), torch.device("meta"):
        return make_model(config)


def tensor_shapes(config: GPTConfig) -> dict[str, Size]:
    """Return the shape of each tensor of a model's state_dict by its name."""
    return {name: tensor.shape for name, tensor in empty_model(config).state_dict().items()}


class _WithoutInitialising(TorchFunctionMode):
    """Skips torch.nn.init: on the meta device a `normal_` would first import torch._dynamo, which takes a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
