"""What a run's record shows, what matters most first: `explain` for a finished run, `News` while it trains."""

from pathlib import Path

from llm.config import TrainConfig
from llm.errors import UserError
from llm.record.bands import Band, band_of_run, normal
from llm.record.metrics import read_record
from llm.record.verdicts import (
    STEP,
    diverges,
    first_loss,
    landmark,
    not_training,
    overfits,
    plateau,
    refused,
    short_warmup,
    spikes,
    too_slow,
    waits_for_data,
)
from llm.storage.lines import Row


def explain(rows: list[Row], config: TrainConfig, band: Band | None = None) -> list[str]:
    """The lines worth knowing about a run, most important first. `band`: where such runs lie, if that is known."""
    found = (
        diverges(rows, config),
        normal(rows, band),
        first_loss(rows, config),
        short_warmup(rows, config),
        overfits(rows, config),
        spikes(rows, config),
        refused(rows, config),
        too_slow(rows, config),
        plateau(rows),
        not_training(rows),
        waits_for_data(rows),
        landmark(rows, config),
    )
    return [line for line in found if line is not None]


class News:
    """What there is to say about the run in `run_dir` while it trains, each line once.

    The record is read whole, but only where the run is 1 % longer than at the last look: at each of the first
    100 evaluations, then more rarely. So all looks together read about 100 times the final record, however long.
    """

    def __init__(self, run_dir: Path, config: TrainConfig) -> None:
        self.run_dir, self.config, self.band = run_dir, config, band_of_run(run_dir)
        self._said: set[str] = set()
        self._looked = 0  # step of the last look

    def at(self, step: int) -> list[str]:
        """The lines that are new at the evaluation of `step`. A record that cannot be read is one of them."""
        if step < 1.01 * self._looked:
            return []
        self._looked = step
        try:
            lines = explain(read_record(self.run_dir), self.config, self.band)
        except UserError as error:  # no reason to end a run
            lines = [str(error)]
        named = {STEP.sub("", line.partition(":")[0]): line for line in lines}
        new = [line for name, line in named.items() if name not in self._said]
        self._said |= named.keys()
        return new
