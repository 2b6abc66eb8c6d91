"""Weights in files: our .pt files and those of other programs, checked before they are used. Loading runs no code."""

from llm.weights.pt_file import load_model, read_weights, run_config, weights_file

__all__ = ["load_model", "read_weights", "run_config", "weights_file"]
