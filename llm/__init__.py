"""Train a small GPT from scratch: `GPT`, `GPTConfig`, `fit`, `Run`. Using one of them imports torch."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig", "Run", "fit"]

_HOME = {"GPT": "llm.model", "GPTConfig": "llm.config", "Run": "llm.run", "fit": "llm.run"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llm' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
