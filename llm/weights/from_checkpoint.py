"""The weights in a checkpoint of a run, such as runs/base/step-000500."""

from pathlib import Path

from torch import Tensor

from llm.arch import tensor_shapes
from llm.config import GPTConfig
from llm.errors import UserError
from llm.storage import checkpoint
from llm.weights.pt_file import check_tensors, run_config


def is_checkpoint(folder: Path) -> bool:
    """Return whether `folder` is a checkpoint to resume from."""
    return (folder / "state.json").is_file()


def read_checkpoint(folder: Path, preferred: str = "last") -> tuple[GPTConfig, dict[str, Tensor]]:
    """Return the shape and the state_dict of the model in a checkpoint, with the settings of the run that it is in.

    `preferred`: "average" for the average of the weights, anything else for the weights themselves.

    Raises UserError if a byte of it has changed, if it is not in the folder of its run, or if it has no average.
    """
    groups, _ = checkpoint.load_state(folder)
    if not (folder.parent / "config.toml").is_file():
        raise UserError(f"{folder}: a checkpoint outside its run; copy config.toml and tokenizer.json to its parent")
    config = run_config(folder.parent).model
    weights = groups.get("model", {})
    if preferred == "average":
        weights = groups.get("ema", {})
        if not weights:
            raise UserError(f"{folder}: has no average of the weights, which runs with --ema save; leave --weights out")
        del weights["updates"]
    if config.tied_lm_head and "wte.weight" in weights:  # a state has tied weights once
        weights["lm_head.weight"] = weights["wte.weight"]
    check_tensors(folder, weights, tensor_shapes(config))
    return config, weights
