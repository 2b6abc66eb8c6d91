"""What the page shows of several runs: their comparison, and of a try its table and small multiples."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.experiments.outcome import columns, outcomes
from llm.experiments.picture import alternative, draw_try
from llm.experiments.trials import NAME, read_try
from llm.record import metrics
from llm.record.chart_style import data_url


def comparison_of(paths: Sequence[Path]) -> dict[str, str]:
    """Return {"words": the verdicts, "picture": a data URL, "" if there is nothing to draw}.

    They are those of `losscurve compare`, without evaluating weights. Models and runs without a record are left out.
    """
    from llm.experiments.compare import compare  # imports torch, which a page does not otherwise need
    from llm.experiments.comparison_picture import draw_comparisons
    from llm.experiments.words import report_lines

    recorded = [path for path in paths if (path / metrics.NAME).is_file()]
    if not recorded:
        return {"words": "no run has a record yet", "picture": ""}
    try:
        groups, comparisons, notes = compare(recorded, with_weights=False)
    except UserError as error:  # such as a run that is damaged
        return {"words": str(error), "picture": ""}
    has_findings = any(comparison.findings for comparison in comparisons)
    picture = data_url(draw_comparisons(groups, comparisons)) if has_findings else ""
    return {"words": "\n".join([*notes, *report_lines(groups, comparisons)]), "picture": picture}


def runs_of(folder: Path) -> list[Path]:
    """Return the run folders of the try in `folder`, also of runs to come; `folder` itself if it is no try.

    Raises UserError if its try.json is damaged.
    """
    if not (folder / NAME).exists():
        return [folder]
    tried = read_try(folder)
    return [tried.run_dir(setting, seed) for setting in tried.settings for seed in tried.seeds]


class FollowedTry:
    """The try in `folder`, which is read and drawn anew only if one of its files has changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stamps: list[Any] = []
        self._answer: dict[str, Any] = {}

    def answer(self) -> dict[str, Any]:
        """Return its name, an error or "", the rows of its table with the heads first, and its picture, a data URL."""
        files = (self.folder / NAME, *sorted(self.folder.glob(f"*/*/{metrics.NAME}")))
        stamps = []
        for path in files:
            with contextlib.suppress(OSError):  # not there, or no longer
                found = path.stat()
                stamps.append((path, found.st_size, found.st_mtime_ns))
        if stamps != self._stamps:
            self._stamps = stamps
            name = self.folder.resolve().name
            try:
                self._answer = {"name": name, "error": "", **self._read()}
            except UserError as error:  # such as a damaged run
                self._answer = {"name": name, "error": str(error), "rows": [], "picture": "", "words": ""}
        return self._answer

    def _read(self) -> dict[str, Any]:
        tried = read_try(self.folder)
        found = outcomes(tried)
        table = columns(tried, found)
        rows = [list(table), *map(list, zip(*table.values(), strict=True))]
        return {"rows": rows, "picture": data_url(draw_try(tried, found)), "words": alternative(found)}
