"""A report as data: the settings and results of a run, its samples and its training text."""

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
from llm.record.points import thin_by_mean
from llm.report.words import format_setting, last_value, setting_words, settings_to_repeat
from llm.storage.lines import Row


class Sample(NamedTuple):
    """A text generated at an evaluation."""

    step: int
    loss: float  # validation loss, nats per token
    prompt: str
    text: str  # without the prompt
    left_out: int  # characters
    notable: bool  # the first, the last, or that of the best evaluation


class Evaluation(NamedTuple):
    """One evaluation. Losses are in nats per token; `train` is the mean over the steps since the one before."""

    step: int
    lr: float | None
    train: float | None
    val: float
    bits_per_byte: float | None
    averaged: float | None  # of the average of the weights
    seconds: float | None


class Frequency(NamedTuple):
    """A token and how often the training text has it."""

    token: str
    id: int
    times: int
    share: float


class Overlap(NamedTuple):
    """How much of some texts the training text contains word for word."""

    source: str
    share: float | None  # of their N-grams
    longest: int  # tokens
    passage: str


@dataclass(frozen=True)
class Memorisation:
    """Samples that were searched for in the training text."""

    weights: str  # name of the file
    tokens: int  # generated at each temperature
    overlaps: Sequence[Overlap]  # one for each temperature, and one for the validation text


@dataclass(frozen=True)
class DataCard:
    """What a run was trained on. `facts` are names and values, in words."""

    facts: Sequence[tuple[str, str]]
    trouble: str | None = None  # why the token files could not be read
    most: Sequence[Frequency] = ()
    least: Sequence[Frequency] = ()
    unseen: int = 0  # tokens of the vocabulary that the training text does not have
    counted: int = 0  # training tokens counted
    source: str | None = None  # name of the text
    train_tokens: int | None = None


@dataclass(frozen=True)
class Report:
    """The content of a report.

    `memorisation` is None if not requested; a string explains why it is unavailable.
    """

    name: str
    config: TrainConfig
    rows: list[Row]
    band: Band | None
    parameters: int
    verdicts: Sequence[str]
    evaluations: Sequence[Evaluation]
    samples: Sequence[Sample]
    sample_count: int  # before some were left out
    environment: Sequence[tuple[str, str]]
    card: DataCard
    memorisation: Memorisation | str | None
    run_dir: Path
    created: str  # date and time
    version: str = __version__

    @property
    def step(self) -> int:
        """The number of completed steps."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def is_complete(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.config.max_steps

    @property
    def lowest(self) -> Row | None:
        """The evaluation with the lowest validation loss."""
        return best(self.rows)

    @property
    def whose(self) -> str:
        """Words after that evaluation's loss that say if it is not of the weights themselves."""
        return ", by the average of the weights" if self.lowest and "is_average" in self.lowest else ""

    @property
    def kind(self) -> str:
        """What the model is called."""
        return "llama" if self.config.model.arch == "llama" else "GPT"

    @property
    def origin(self) -> str:
        """Words for the weights that the run started from, "" for fresh ones."""
        start = self.config.init_from
        return f"the weights of {plain(setting_words('init_from', start)[0], 60)}" if start else ""

    @property
    def teachers(self) -> str:
        """The names of the models that the run learned from too, "" without any."""
        return " and ".join(plain(name, 60) for name in setting_words("teacher", self.config.teacher))

    @property
    def has_average(self) -> bool:
        """Whether the record has losses of an average of the weights."""
        return any(evaluation.averaged is not None for evaluation in self.evaluations)

    @property
    def seconds(self) -> float | None:
        """The training time."""
        return last_value(self.rows, "seconds")

    @property
    def tokens(self) -> int:
        """The number of tokens trained on. In a fork, a step before it may have had another number of them."""
        recorded = last_value(self.rows, "tokens")
        return self.step * self.config.tokens_per_step if recorded is None else int(recorded)

    @property
    def text(self) -> str:
        """The name of the training text."""
        name = self.card.source or ", ".join(setting_words("text", self.config.text)) or "a text of unknown origin"
        return plain(name, 60)

    @property
    def perplexity(self) -> float | None:
        """exp(lowest loss), None if that is huge. A uniform guess among so many tokens would have the same loss."""
        if self.lowest is None or self.lowest["loss"] >= 20:
            return None
        return math.exp(self.lowest["loss"])

    @property
    def epochs(self) -> float | None:
        """How many times the training text was read, in tokens; None if its size is unknown."""
        return self.tokens / self.card.train_tokens if self.card.train_tokens else None

    def median(self, key: str) -> float | None:
        """Return the median of a number over the training rows, None if none has it."""
        values = [row[key] for row in self.rows if row["split"] == "train" and row[key] is not None]
        return statistics.median(values) if values else None

    def points(self, key: str, split: str = "train") -> list[tuple[float, float]]:
        """Return (step, value) of a number, thinned by `record.points.thin_by_mean`."""
        recorded = [(row["step"], row[key]) for row in self.rows if row["split"] == split and row[key] is not None]
        return list(thin_by_mean(recorded))

    def settings(self) -> list[tuple[str, str, bool]]:
        """Return every setting: its name, its value, and whether it differs from the chapter's recipe."""
        differing = settings_to_repeat(self.config)
        values = to_settings(self.config)
        return [(name, format_setting(name, values[name]), name in differing) for name in FIELDS if name in values]

    def command(self) -> str:
        """Return the command that trains such a run."""
        command = ["losscurve train"]
        for name, value in settings_to_repeat(self.config).items():
            words = setting_words(name, value)
            if any(word.startswith("-") for word in words):  # would be parsed as a flag
                command += [shlex.quote(f"--{name}={word}") for word in words]
            else:
                command += [f"--{name}", shlex.join(words)]
        return " ".join(command)
