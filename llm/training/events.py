"""The events that a run yields while it trains: each step, evaluation and checkpoint, and notices for the user."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llm.evaluate import Evaluation
from llm.schedule import format_lr


@dataclass(frozen=True)
class Step:
    """One finished step. Its tensors stay on the device until they are read."""

    step: int  # completed steps
    loss: Tensor  # mean over the batch, nats per token
    grad_norm: Tensor  # before clipping
    refused: Tensor  # true if the loss was not finite, or (float16 aside, which has a scaler) the gradient


@dataclass(frozen=True)
class Line:
    """One evaluation. `str` gives the line that the chapter prints."""

    step: int
    lr: float
    train_loss: float  # mean over the steps since the line before; at step 0, of the first batch
    evaluation: Evaluation
    seconds: float  # since the start of the run
    sample: str
    averaged: float | None = None  # validation loss of the average of the weights, nats per token

    def __str__(self) -> str:
        losses = f"train {self.train_loss:.4f} | val {self.evaluation.loss:.4f}"
        if self.averaged is not None:
            losses += f" | ema {self.averaged:.4f}"
        return f"step {self.step:5d} | lr {format_lr(self.lr)} | {losses} | t {self.seconds:.1f}s"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has been written to disk."""

    step: int
    folder: Path


@dataclass(frozen=True)
class Notice:
    """A message for the user."""

    text: str


Event = Step | Line | Saved | Notice
