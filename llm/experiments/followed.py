"""A try that a page follows: its table and small multiples, as the report of a try has them."""

import contextlib
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.experiments.outcome import columns, outcomes
from llm.experiments.picture import alternative, picture_url
from llm.experiments.trials import NAME, read_try
from llm.record import metrics


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
        return {"rows": rows, "picture": picture_url(tried, found), "words": alternative(found)}
