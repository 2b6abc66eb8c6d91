"""A run folder, followed from another process: only what is new is read, and no more kept than can be drawn.

Opens plain files for reading, briefly, and nothing else, so that a training run cannot notice. A record that is cut
back (a resume), replaced (a restart) or deleted is read anew. Losses are in nats per token.
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
from llm.page.thin import COLUMNS, Point, Thinned
from llm.record import samples
from llm.record.bands import Band, band_of_run
from llm.record.explain import explain
from llm.record.metrics import NAME, NUMBERS
from llm.record.samples import Sample, read_samples
from llm.storage.lines import Row

RECENT = 500  # newest training rows, for viewers who have the rest
ROWS = 10_000  # training rows that verdicts look at, evenly spread
BLOCK = 2**22  # bytes parsed at once; no line is longer
LOOK = 4 * BLOCK  # bytes of a record that one look reads, so that a long one is seen to be read
SAMPLE = 20_000  # characters of a sample that are shown
TAIL = 64  # bytes before the place read up to, by which a replaced file is known
WEIGHTS = {"best": "best.pt", "last": "model.pt"}
Stamp = tuple[int, ...]


class Follower:
    """What is known so far of the run in `path`. `look` reads what is new; all else only tells."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.generation = 0  # of the record: one more each time it is read anew
        self.version = 0  # one more each time something beside training rows changed
        self.config: TrainConfig | None = None
        self.band: Band | None = None
        self.samples: list[int] = []  # steps of the evaluations that have one
        self.weights: list[str] = []  # of `WEIGHTS`, those that are there
        self.errors: dict[str, str] = {}  # by file
        self._settings_stamp: object = None
        self._samples_stamp: object = None
        self._forget()

    def _forget(self) -> None:
        """Begin the record anew."""
        self.generation += 1
        self.there = False  # whether there is a record
        self.count = 0  # training rows so far
        self.curves = {key: Thinned(key) for key in ("loss", "grad_norm", "tokens_per_second")}
        self.recent: deque[Point] = deque(maxlen=RECENT)
        self.val: list[Row] = []
        self.last: Row | None = None
        self.changed_at = 0.0  # seconds since 1970
        self.size = self.offset = 0  # bytes of the record, and those read
        self.behind = False  # whether there is more than the last look read
        self._tail = b""
        self._stamp: Stamp = ()
        self._sampled: list[Row] = []  # every `_every`-th training row
        self._special: deque[Row] = deque(maxlen=ROWS)  # evaluations, and rows with spikes or refused steps
        self._every = 1
        self.verdicts: list[str] = []
        self._explained = -1  # step

    def rows(self) -> list[Row]:
        """The evaluations and the training rows kept for verdicts, in order."""
        return sorted([*self._sampled, *self._special], key=lambda row: int(row["step"]))

    def look(self) -> None:
        """Read what is new. A file that cannot be read is one of `errors`, to be shown and tried again."""
        before, evaluated = self._beside(), (self.generation, len(self.val))
        self._look_at_settings()
        self._look_at_record()
        if evaluated != (self.generation, len(self.val)):
            self._samples_stamp = object()  # unlike any: which headers are known has changed
        if evaluated != (self.generation, len(self.val)) or self._explained < 0:
            self._explain()
        self._look_at_samples()
        self.weights = [name for name, file in WEIGHTS.items() if stamp_of(self.path / file)]
        self.version += before != self._beside()

    def _beside(self) -> tuple[object, ...]:
        """What differs where anything but training rows changed."""
        record = self.generation, self.there, len(self.val), self.behind
        return *record, self._settings_stamp, self.samples, self.weights, self.verdicts, dict(self.errors)

    def _look_at_settings(self) -> None:
        stamp = stamp_of(self.path / "config.toml"), stamp_of(self.path / "env.json")
        if stamp == self._settings_stamp:
            return
        self._settings_stamp, self._explained = stamp, -1
        self.config = self.band = None
        self.errors.pop("config.toml", None)
        if stamp[0] is None:
            return
        try:
            self.config = from_settings(read_toml(str(self.path / "config.toml")))
            self.band = band_of_run(self.path)
        except (UserError, OSError) as error:
            self.errors["config.toml"] = str(error)

    def _look_at_record(self) -> None:
        path = self.path / NAME
        try:
            if stamp_of(path) is None:
                raise FileNotFoundError
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                stamp = stamp_from(found)
                if stamp == self._stamp and not self.behind:
                    return
                self.errors.pop(NAME, None)
                file.seek(self.offset - len(self._tail))
                if file.read(len(self._tail)) != self._tail:
                    self._forget()
                self.there, self._stamp, self.size, self.changed_at = True, stamp, found.st_size, found.st_mtime
                file.seek(self.offset)
                self._read(file)
        except (FileNotFoundError, NotADirectoryError):
            self.errors.pop(NAME, None)
            if self.there:
                self._forget()
        except OSError as error:
            self.errors[NAME] = f"{path}: cannot be read ({error.strerror})"

    def _read(self, file: BinaryIO) -> None:
        """Take in whole lines from here on, up to `LOOK` bytes; a torn last one waits for its end."""
        rest, until = b"", self.offset + LOOK
        while self.offset < until and (block := file.read(BLOCK)):
            whole, end, rest = (rest + block).rpartition(b"\n")
            if not end and len(rest) > BLOCK:
                self.errors[NAME] = f"{self.path / NAME}: has a line of more than 4 MiB and is read no further"
                self.behind = False
                return
            if end:
                self.offset += len(whole) + 1
                self._tail = (self._tail + whole[-TAIL:] + end)[-TAIL:]
                for row in rows_in(whole):
                    self._add(row)
        self.behind = self.offset + len(rest) < self.size

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

    def _look_at_samples(self) -> None:
        stamp = stamp_of(self.path / samples.NAME)
        if stamp == self._samples_stamp:
            return
        self._samples_stamp = stamp
        self.samples = [sample.step for sample in self._read_samples()]

    def _read_samples(self) -> list[Sample]:
        """The samples of the run; none where the file is damaged, which `verify` is there to tell."""
        try:
            return read_samples(self.path) if stamp_of(self.path / samples.NAME) else []
        except UserError:
            return []

    def sample(self, step: int) -> str | None:
        """The sample of the evaluation at `step`, None where there is none (any more)."""
        found = next((sample for sample in self._read_samples() if sample.step == step), None)
        return None if found is None else (found.prompt + found.text)[:SAMPLE]

    def _explain(self) -> None:
        """Verdicts, where the run is 1 % longer than when they were last made."""
        step = self.last["step"] if self.last else 0
        if self.config is None or self.last is None or step < 1.01 * self._explained:
            return
        self._explained = step
        try:
            self.verdicts = explain(self.rows(), self.config, self.band)
        except (ArithmeticError, ValueError, TypeError) as error:  # a record that no run of ours wrote
            self.verdicts = [f"no verdict: {error}"]


def stamp_from(found: os.stat_result) -> Stamp:
    """What differs where a file was replaced or written."""
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def stamp_of(path: Path) -> Stamp | None:
    """The stamp of a plain file; None where there is none (to open another kind could wait for ever)."""
    try:
        found = path.stat()
    except OSError:
        return None
    return stamp_from(found) if stat.S_ISREG(found.st_mode) else None


def rows_in(block: bytes) -> Iterator[Row]:
    """The rows of whole lines. A damaged line is left out: `verify` is there to name it."""
    lines = [line for line in block.split(b"\n") if line.strip()]
    try:  # all at once is several times faster
        found = json.loads(b"[" + b",".join(lines) + b"]", parse_constant=lambda _: None)
        if len(found) != len(lines):
            raise ValueError
    except (ValueError, RecursionError):
        found = [parsed(line) for line in lines]
    for row in found:
        if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 2**53:
            clean(row)
            if row.get("split") in ("train", "val"):
                yield row


def parsed(line: bytes) -> Any:
    """What a line of JSON says; None for one that is damaged."""
    try:
        return json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None


def clean(row: Row) -> None:
    """Give a row every key of `NUMBERS`; what is no number that JavaScript can hold becomes None."""
    for key in NUMBERS:
        value = row.get(key)
        if value.__class__ not in (int, float) or not -1e30 < value < 1e30:
            row[key] = None
