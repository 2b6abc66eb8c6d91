"""Weights in files: our .pt files and those of other programs, checked before they are used. Loading runs no code."""

from llm.weights.opened import Opened, open_weights
from llm.weights.pt_file import load_model, read_weights, run_config, weights_file

__all__ = ["Opened", "load_model", "open_weights", "read_weights", "run_config", "weights_file"]
