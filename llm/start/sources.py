"""What a run takes from other models: the weights of `init_from`, and its teachers."""

import dataclasses
from collections.abc import Collection

from llm.config import TrainConfig
from llm.start.init_from import Start, starting_point
from llm.start.run_folder import Say
from llm.start.teacher import open_teachers, with_tokens
from llm.tokens.tokenizer import Tokenizer
from llm.weights.opened import Opened


@dataclasses.dataclass(frozen=True)
class Sources:
    """The other models of a run, and its config with what they decide: shape, vocabulary, kind of the tokenizer."""

    config: TrainConfig
    start: Start | None  # None: new weights
    teachers: list[Opened]

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Their tokenizer; None if there are none, or it is unknown."""
        if self.start is not None:
            return self.start.tokenizer
        return self.teachers[0].tokenizer if self.teachers else None


def open_sources(config: TrainConfig, say: Say, given: Collection[str]) -> Sources:
    """Open the models that a config names. `given` are the names of the settings that the user gave.

    Raises UserError if one cannot be used, or they do not go together.
    """
    start = None
    if config.init_from:
        start = starting_point(config, say, given)
        config = start.config
    teachers = open_teachers(config)
    if teachers and start is None:
        config = with_tokens(config, teachers, say)
    return Sources(config, start, teachers)
