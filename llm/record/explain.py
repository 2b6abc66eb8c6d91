"""Explain a run's record, most important verdict first: `explain` after a run, `News` during it."""

import re
from pathlib import Path

from llm.config import TrainConfig
from llm.errors import UserError
from llm.record.bands import Band, band_of_run, band_verdict
from llm.record.metrics import read_record
from llm.record.rate_verdicts import diverges, short_warmup, too_slow
from llm.record.time_verdicts import not_training, waits_for_data
from llm.record.verdicts import first_loss, landmark, overfits, plateau, refused, spikes
from llm.storage.lines import Row

STEP = re.compile(r"step [\d,]+")  # in the name of a verdict; the step may change while the verdict stays


def explain(rows: list[Row], config: TrainConfig, band: Band | None = None) -> list[str]:
    """Return the verdicts on a run, one line each, most important first.

    `band` is the reference band of the run's settings and data, if there is one.
    """
    verdicts = (
        diverges(rows, config),
        band_verdict(rows, band),
        first_loss(rows, config),
        short_warmup(rows, config),
        overfits(rows, config),
        spikes(rows, config),
        refused(rows, config),
        too_slow(rows, config),
        plateau(rows, config),
        not_training(rows),
        waits_for_data(rows),
        landmark(rows, config),
    )
    return [line for line in verdicts if line is not None]


class News:
    """The verdicts on the run in `run_dir` while it trains, each reported once.

    The record is read whole, but only if the run is 1 % longer than at the last look: at each of the first 100
    evaluations, then less often. So all looks together read about 100 times the size of the final record.
    """

    def __init__(self, run_dir: Path, config: TrainConfig) -> None:
        self.run_dir = run_dir
        self.config = config
        self.band = band_of_run(run_dir)
        self._reported: set[str] = set()  # names of verdicts
        self._last_look = 0  # step

    def at(self, step: int) -> list[str]:
        """Return the new verdicts at the evaluation of `step`. If the record cannot be read, the error is one."""
        if step < 1.01 * self._last_look:
            return []
        self._last_look = step
        try:
            lines = explain(read_record(self.run_dir), self.config, self.band)
        except UserError as error:  # a damaged record must not stop the run
            lines = [str(error)]
        by_name = {_name_of(line): line for line in lines}
        new = [line for name, line in by_name.items() if name not in self._reported]
        self._reported |= by_name.keys()
        return new


def _name_of(line: str) -> str:
    """Return the name of a verdict: the part before the colon, without its step."""
    return STEP.sub("", line.partition(":")[0])
