"""A report as data: what a run was, what it came to, what it wrote and on what it was trained."""

import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llm import __version__
from llm.config import FIELDS, TrainConfig, to_settings
from llm.record.bands import Band
from llm.record.chart_style import plain
from llm.record.metrics import best
from llm.record.points import thinned
from llm.report.words import differing_settings, last, spelled, spelled_words
from llm.storage.lines import Row


class Sample(NamedTuple):
    """A text written at an evaluation."""

    step: int
    loss: float
    prompt: str
    text: str  # without the prompt
    left_out: int  # characters
    notable: bool  # the first, the last, that of the best evaluation


class Evaluation(NamedTuple):
    """A line of the run: losses in nats per token, `train` the mean over the steps since the line before."""

    step: int
    lr: float | None
    train: float | None
    val: float
    bits_per_byte: float | None
    seconds: float | None


class Frequency(NamedTuple):
    """A token and how often it stands in the training text."""

    token: str
    id: int
    times: int
    share: float


class Seen(NamedTuple):
    """What of some samples stands in the training text word for word."""

    what: str
    share: float | None  # of the N-grams
    longest: int  # tokens
    passage: str


@dataclass(frozen=True)
class Memory:
    """Samples looked for in the training text."""

    weights: str  # the file
    tokens: int  # drawn at each temperature
    seen: Sequence[Seen]  # by temperature, and of the validation text


@dataclass(frozen=True)
class Card:
    """What a run was trained on. `facts` are named values in words."""

    facts: Sequence[tuple[str, str]]
    trouble: str | None = None  # why the token files could not be looked at
    most: Sequence[Frequency] = ()
    least: Sequence[Frequency] = ()
    unseen: int = 0  # tokens of the vocabulary that the training text does not have
    counted: int = 0  # training tokens counted
    source: str | None = None  # name of the text
    train_tokens: int | None = None


@dataclass(frozen=True)
class Report:
    """A run, ready to be written down. A `memory` that is a text says why there is none; None: not asked for."""

    name: str
    config: TrainConfig
    rows: list[Row]
    band: Band | None
    parameters: int
    verdicts: Sequence[str]
    evaluations: Sequence[Evaluation]
    samples: Sequence[Sample]
    samples_in_all: int
    environment: Sequence[tuple[str, str]]
    card: Card
    memory: Memory | str | None
    run_dir: Path
    made: str
    version: str = __version__

    @property
    def step(self) -> int:
        """Steps done."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def complete(self) -> bool:
        return self.step >= self.config.max_steps

    @property
    def lowest(self) -> Row | None:
        """The best evaluation."""
        return best(self.rows)

    @property
    def seconds(self) -> float | None:
        return last(self.rows, "seconds")

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.step * self.config.tokens_per_step

    @property
    def text(self) -> str:
        """What it was trained on, in a few words."""
        words = self.card.source or ", ".join(spelled_words("text", self.config.text)) or "a text of unknown origin"
        return plain(words, 60)

    @property
    def perplexity(self) -> float | None:
        """exp of the best loss: among how many equally likely tokens one would be as unsure."""
        return math.exp(self.lowest["loss"]) if self.lowest and self.lowest["loss"] < 20 else None

    @property
    def epochs(self) -> float | None:
        """How many times the training text was read, in tokens drawn; None where its size is not known."""
        return self.tokens / self.card.train_tokens if self.card.train_tokens else None

    def middle(self, key: str) -> float | None:
        """The median of a number over the training rows."""
        values = [row[key] for row in self.rows if row["split"] == "train" and row[key] is not None]
        return statistics.median(values) if values else None

    def points(self, key: str, split: str = "train") -> list[tuple[float, float]]:
        """(step, value) of a number, at most `plot.POINTS`, neighbours averaged."""
        return list(thinned([(r["step"], r[key]) for r in self.rows if r["split"] == split and r[key] is not None]))

    def chosen(self) -> list[tuple[str, str, bool]]:
        """Every setting: its name, its value, and whether it differs from the chapter's recipe."""
        differing = differing_settings(self.config)
        values = to_settings(self.config)
        return [(name, spelled(name, values[name]), name in differing) for name in FIELDS if name in values]

    def command(self) -> str:
        """What to type for such a run."""
        values = differing_settings(self.config)
        values = differing_settings(self.config)
        command = ["losscurve train"]
        for name, value in values.items():
            words = spelled_words(name, value)
            dashed = any(word.startswith("-") for word in words)  # which would be taken for a flag
            command += (
                [shlex.quote(f"--{name}={word}") for word in words] if dashed else [f"--{name}", shlex.join(words)]
            )
        return " ".join(command)
