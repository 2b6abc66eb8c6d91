"""Follow a growing run folder from another process: read only what is new, and keep no more than the page draws.

It opens plain files for reading, briefly, and nothing else, so that it cannot disturb a training run. A record that is
cut back (by a resume), replaced (by a restart) or deleted is read again from its start. Losses are in nats per token.
"""

import json
import os
import stat
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llm.config import TrainConfig, from_settings, read_toml
from llm.errors import UserError
from llm.page.thin import COLUMNS, ExtremesCurve, Point
from llm.record import samples
from llm.record.bands import Band, band_of_run
from llm.record.explain import explain
from llm.record.metrics import NAME, NUMBERS
from llm.record.runs import origin_lines
from llm.record.samples import Sample, read_samples
from llm.storage.lines import Row

RECENT = 500  # newest training rows, for viewers that have the earlier ones
ROWS = 10_000  # training rows for the verdicts, evenly spaced
BLOCK = 2**22  # bytes parsed at once; the limit of a line
LOOK = 4 * BLOCK  # bytes of a record read by one update, so that the page can show the progress on a long one
SAMPLE = 20_000  # characters of a sample that the page shows
TAIL = 64  # bytes before the offset, compared to notice a replaced file
WEIGHTS = {"best": "best.pt", "last": "model.pt"}
MODEL = "model"  # the weights of a model that is no run
Stamp = tuple[int, ...]


class Follower:
    """The state of the run in `path`, as of the last `update`. All other methods only return what is known."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self.generation = 0  # of the record: increases each time it is read again from its start
        self.version = 0  # increases each time something other than training rows changes
        self.config: TrainConfig | None = None
        self.band: Band | None = None
        self.samples: list[int] = []  # steps of the evaluations that have a sample
        self.is_model = is_model(path)  # for the playground only: there is no record to follow
        self.weights = [MODEL] if self.is_model else []  # of a run: those of WEIGHTS that exist
        self.errors: dict[str, str] = {}  # by file
        self._settings_stamp: object = None
        self._samples_stamp: object = None
        self._reset_record()

    def _reset_record(self) -> None:
        """Forget the record, to read it from its start."""
        self.generation += 1
        self.has_record = False
        self.count = 0  # training rows so far
        self.curves = {key: ExtremesCurve(key) for key in ("loss", "grad_norm", "tokens_per_second")}
        self.recent: deque[Point] = deque(maxlen=RECENT)
        self.val: list[Row] = []
        self.last: Row | None = None
        self.changed_at = 0.0  # seconds since 1970
        self.size = 0  # bytes of the record
        self.offset = 0  # bytes read of it
        self.is_behind = False  # whether the last update left something to read
        self._tail = b""
        self._stamp: Stamp = ()
        self._sampled: list[Row] = []  # every `_every`-th training row
        self._special: deque[Row] = deque(maxlen=ROWS)  # evaluations, and rows with spikes or refused steps
        self._every = 1
        self.verdicts: list[str] = []
        self._explained = -1  # step of the last verdicts

    def rename(self, name: str) -> None:
        """Change the name that the page shows."""
        self.version += name != self.name
        self.name = name

    def rows(self) -> list[Row]:
        """Return the evaluations and the training rows that are kept for the verdicts, in order."""
        return sorted([*self._sampled, *self._special], key=lambda row: int(row["step"]))

    def update(self) -> None:
        """Read what is new. A file that cannot be read adds to `errors`, and is tried again at the next update."""
        if self.is_model:
            return
        state_before = self._state()
        evaluations_before = (self.generation, len(self.val))
        self._update_settings()
        self._update_record()
        evaluations_changed = evaluations_before != (self.generation, len(self.val))
        if evaluations_changed:
            self._samples_stamp = object()  # equal to no stamp: read the samples again
        if evaluations_changed or self._explained < 0:
            self._explain()
        self._update_samples()
        self.weights = [name for name, file in WEIGHTS.items() if stamp_of(self.path / file)]
        if self._state() != state_before:
            self.version += 1

    def _state(self) -> tuple[object, ...]:
        """Return everything but the training rows, to compare."""
        record = (self.generation, self.has_record, len(self.val), self.is_behind)
        return *record, self._settings_stamp, self.samples, self.weights, self.verdicts, dict(self.errors)

    def _update_settings(self) -> None:
        stamp = stamp_of(self.path / "config.toml"), stamp_of(self.path / "env.json")
        if stamp == self._settings_stamp:
            return
        self._settings_stamp = stamp
        self._explained = -1
        self.config = None
        self.band = None
        self.errors.pop("config.toml", None)
        if stamp[0] is None:
            return
        try:
            self.config = from_settings(read_toml(str(self.path / "config.toml")))
            self.band = band_of_run(self.path)
        except (UserError, OSError) as error:
            self.errors["config.toml"] = str(error)

    def _update_record(self) -> None:
        path = self.path / NAME
        try:
            if stamp_of(path) is None:
                raise FileNotFoundError
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                stamp = stamp_from(found)
                if stamp == self._stamp and not self.is_behind:
                    return
                self.errors.pop(NAME, None)
                file.seek(self.offset - len(self._tail))
                if file.read(len(self._tail)) != self._tail:
                    self._reset_record()
                self.has_record = True
                self._stamp = stamp
                self.size = found.st_size
                self.changed_at = found.st_mtime
                file.seek(self.offset)
                self._read(file)
        except (FileNotFoundError, NotADirectoryError):
            self.errors.pop(NAME, None)
            if self.has_record:
                self._reset_record()
        except OSError as error:
            self.errors[NAME] = f"{path}: cannot be read ({error.strerror})"

    def _read(self, file: BinaryIO) -> None:
        """Read complete lines from here on, up to LOOK bytes; an incomplete last line is read later."""
        rest = b""
        until = self.offset + LOOK
        while self.offset < until and (block := file.read(BLOCK)):
            complete, line_break, rest = (rest + block).rpartition(b"\n")
            if not line_break and len(rest) > BLOCK:
                self.errors[NAME] = f"{self.path / NAME}: a line is longer than 4 MiB, so the rest is not read"
                self.is_behind = False
                return
            if line_break:
                self.offset += len(complete) + 1
                self._tail = (self._tail + complete[-TAIL:] + line_break)[-TAIL:]
                for row in rows_in(complete):
                    self._add(row)
        self.is_behind = self.offset + len(rest) < self.size

    def _add(self, row: Row) -> None:
        self.last = row
        if row["split"] == "val":
            self.val.append(row)
            self._special.append(row)
            return
        values = [row[key] for key in COLUMNS]
        for curve in self.curves.values():
            curve.add(values)
        self.recent.append(values)
        if row.get("spikes") or row.get("refused"):
            self._special.append(row)
        elif self.count % self._every == 0:
            self._sampled.append(row)
            if len(self._sampled) > ROWS:
                self._sampled = self._sampled[::2]
                self._every *= 2
        self.count += 1

    def _update_samples(self) -> None:
        stamp = stamp_of(self.path / samples.NAME)
        if stamp == self._samples_stamp:
            return
        self._samples_stamp = stamp
        self.samples = [sample.step for sample in self._read_samples()]

    def _read_samples(self) -> list[Sample]:
        """Return the samples of the run; none if the file is damaged, which `losscurve verify` reports."""
        try:
            return read_samples(self.path) if stamp_of(self.path / samples.NAME) else []
        except UserError:
            return []

    def sample(self, step: int) -> str | None:
        """Return the sample of the evaluation at `step`, None if there is none (any longer)."""
        found = next((sample for sample in self._read_samples() if sample.step == step), None)
        return None if found is None else (found.prompt + found.text)[:SAMPLE]

    def _explain(self) -> None:
        """Update the verdicts if the run is 1 % longer than at their last update."""
        step = self.last["step"] if self.last else 0
        if self.config is None or self.last is None or step < 1.01 * self._explained:
            return
        self._explained = step
        try:
            self.verdicts = [*origin_lines(self.path), *explain(self.rows(), self.config, self.band)]
        except (ArithmeticError, ValueError, TypeError) as error:  # a record that another program wrote
            self.verdicts = [f"no verdict: {error}"]


def is_model(path: Path) -> bool:
    """Whether a path is a model and no run folder: a file of weights, or a folder in Hugging Face's format."""
    return path.is_file() or ((path / "config.json").is_file() and not (path / "config.toml").exists())


def stamp_from(found: os.stat_result) -> Stamp:
    """Return a value that changes whenever a file is written or replaced."""
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def stamp_of(path: Path) -> Stamp | None:
    """Return the stamp of a plain file; None for anything else, because opening a pipe could block for ever."""
    try:
        found = path.stat()
    except OSError:
        return None
    return stamp_from(found) if stat.S_ISREG(found.st_mode) else None


def rows_in(block: bytes) -> Iterator[Row]:
    """Yield the rows of complete lines. A damaged line is skipped; `losscurve verify` names it."""
    lines = [line for line in block.split(b"\n") if line.strip()]
    try:  # parsing all lines at once is several times faster
        found = json.loads(b"[" + b",".join(lines) + b"]", parse_constant=lambda _: None)
        if len(found) != len(lines):
            raise ValueError
    except (ValueError, RecursionError):
        found = [_parse(line) for line in lines]
    for row in found:
        if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 2**53:
            _clean(row)
            if row.get("split") in ("train", "val"):
                yield row


def _parse(line: bytes) -> Any:
    """Return the JSON value of a line, None if it is damaged."""
    try:
        return json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None


def _clean(row: Row) -> None:
    """Give a row every key of NUMBERS; a value that is no number of a range that JavaScript can hold becomes None."""
    for key in NUMBERS:
        value = row.get(key)
        if value.__class__ not in (int, float) or not -1e30 < value < 1e30:
            row[key] = None
