"""Compare two runs that should be equal except for the order of summation."""

import math
from pathlib import Path

import torch

from llm.config import TrainConfig
from llm.errors import Failure
from llm.record.metrics import read_record
from llm.storage import checkpoint

# Largest differences of two runs that sum in another order: of losses in nats per token, and the root mean square of
# the weights' difference in updates. Measured: 1e-6 and 2e-6 in float32, 8e-5 and 2e-2 in bfloat16; 1 or more
# if a resume does not restore the optimizer's state.
TOLERANCES = {"float32": (1e-4, 1e-2), "bfloat16": (1e-2, 0.1), "float16": (1e-2, 0.1)}


def update_size(config: TrainConfig) -> float:
    """Return about the root mean square of the largest update: max_lr with AdamW, muon_lr / sqrt(columns) with Muon."""
    if config.optimizer != "muon":
        return config.max_lr
    return max(config.max_lr, config.muon_lr / math.sqrt(config.model.n_embd))


def run_differences(expected: Path, found: Path) -> tuple[float, float]:
    """Return the differences of two finished runs, given their folders.

    They are the largest difference of their losses, of the average of the weights too (nats per token), and the root
    mean square of the difference of their weights.

    Raises Failure if the runs took other steps, had other learning rates, or skipped other batches.
    """
    expected_rows = read_record(expected)
    found_rows = read_record(found)
    for column in ("step", "split", "lr", "tokens"):
        if [row[column] for row in expected_rows] != [row[column] for row in found_rows]:
            raise Failure(
                f"NOT the same run: the column {column} of metrics.jsonl differs from that of an uninterrupted run"
            )
    differences = []
    for row, other in zip(expected_rows, found_rows, strict=True):
        for column in ("loss", "val_loss_ema"):
            loss = row[column]
            other_loss = other[column]
            if (loss is None) != (other_loss is None):
                raise Failure(
                    "NOT the same run: a batch was skipped that an uninterrupted run did not skip, or vice versa"
                )
            if loss is not None:
                differences.append(abs(loss - other_loss))
    expected_weights = checkpoint.newest_state(expected)[0]["model"]
    found_weights = checkpoint.newest_state(found)[0]["model"]
    apart = torch.cat([(expected_weights[name] - found_weights[name]).flatten() for name in expected_weights])
    return max(differences, default=math.nan), float(apart.square().mean().sqrt())
