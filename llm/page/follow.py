"""A run folder, followed from another process: only what is new is read, and never more kept than can be drawn.

Opens files for reading, briefly, and nothing else, so that a training run cannot notice. A record that is cut back
(a resume), replaced (a restart) or deleted is read anew. Losses are in nats per token.
"""

import json
import math
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llm.bands import Band, band_of_run
from llm.config import TrainConfig, from_settings, read_toml, to_settings
from llm.errors import UserError
from llm.explain import MEANINGS, explain
from llm.metrics import NAME, NUMBERS, Row, best, overfits_since
from llm.plot import LANDMARKS
from llm.schedule import lr_at

POINTS = 2000  # of a curve, at most
RECENT = 500  # newest training rows, for viewers who have the rest
ROWS = 10_000  # training rows that verdicts look at, evenly spread
BLOCK = 2**22  # bytes read and parsed at once
SAMPLES = 200  # along the time line, evenly spread
SAMPLE_LENGTH = 20_000  # characters
TAIL = 64  # bytes before the place read up to, by which a replaced file is known
COLUMNS = ("step", "tokens", "seconds", "loss", "grad_norm", "tokens_per_second", "lr")
Point = list[float | None]  # the values of `COLUMNS` in a row
Values = list[Point]
HEADER = re.compile(r"^--- step (\d{1,18}) \| val (-?[\d.]{1,30}|nan|inf) ---$", re.MULTILINE)


class Thinned:
    """A curve of at most `POINTS` rows: of each stretch of equally many, those of the lowest and highest value.

    When stretches are too many, each two neighbours become one. So a row costs the same however many came before,
    and the curve keeps its extremes and both ends.
    """

    def __init__(self, key: str) -> None:
        self.column, self.stride = COLUMNS.index(key), 1
        self._stretches: list[Values] = []  # those that are full, each the rows it keeps, in order
        self._held = 0  # rows in the one that is not
        self._low: Point = []
        self._high: Point = []
        self._high_is_later = True
        self._first: Point = []
        self._last: Point = []

    def add(self, row: Point) -> None:
        """A row of `COLUMNS`; one without this curve's value is no point of it."""
        value = row[self.column]
        if value is None:
            return
        if self._held == self.stride:
            self._stretches.append(self._open())
            self._held = 0
            if len(self._stretches) == POINTS // 2 - 2:  # an even number
                self._halve()
        if self._held == 0:
            self._low = self._high = row
        elif value < self._low[self.column]:  # type: ignore[operator]
            self._low, self._high_is_later = row, False
        elif value > self._high[self.column]:  # type: ignore[operator]
            self._high, self._high_is_later = row, True
        self._held += 1
        self._first = self._first or row
        self._last = row

    def rows(self) -> Values:
        """The rows kept, in order, the first and the last among them."""
        if not self._held:
            return []
        kept = [row for stretch in [*self._stretches, self._open()] for row in stretch]
        first, last = [self._first], [self._last]
        return (first if kept[0] is not first[0] else []) + kept + (last if kept[-1] is not last[0] else [])

    def _open(self) -> Values:
        """The rows that the last stretch keeps."""
        if self._low is self._high:
            return [self._low]
        return [self._low, self._high] if self._high_is_later else [self._high, self._low]

    def _halve(self) -> None:
        old = self._stretches
        self._stretches = [self._extremes(a + b) for a, b in zip(old[::2], old[1::2], strict=True)]
        self.stride *= 2

    def _extremes(self, rows: Values) -> Values:
        """Of a few rows, the one of the lowest value and that of the highest, in order."""
        order = sorted(range(len(rows)), key=lambda i: float(rows[i][self.column] or 0))
        return [rows[i] for i in sorted({order[0], order[-1]})]


class Follower:
    """What is known of the run in `path` so far. `look` reads what is new; the rest only tells."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.generation = 0  # of the record: one more each time it is read anew
        self.slow_version = 0  # one more each time something beside training rows changed
        self.error: str | None = None
        self._settings_stamp: tuple[int, ...] | None = None
        self._samples_stamp: tuple[int, ...] | None = None
        self.config: TrainConfig | None = None
        self.samples: list[dict[str, Any]] = []
        self.verdicts: list[str] = []
        self._band: Band | None = None
        self._forget()

    def _forget(self) -> None:
        """Begin the record anew."""
        self.generation += 1
        self.slow_version += 1
        self.count = 0  # training rows so far
        self.curves = {key: Thinned(key) for key in ("loss", "grad_norm", "tokens_per_second")}
        self.recent: deque[Point] = deque(maxlen=RECENT)
        self.val: list[Row] = []
        self._rows: list[Row] = []  # for verdicts: every `_every`-th training row
        self._every, self._explained = 1, -1
        self._offset, self._tail, self._stamp, self._inode = 0, b"", (0, 0), 0
        self.changed_at = 0.0
        self.there = False
        self.last: Row | None = None
        self.verdicts = []

    def look(self) -> None:
        """Read what is new. A file that cannot be read is an `error` to be shown, and tried again next time."""
        evaluations, generation, error = len(self.val), self.generation, self.error
        self.error = None
        self._look_at_settings()
        self._look_at_record()
        if (len(self.val), self.generation) != (evaluations, generation):
            self._samples_stamp = None
        self._look_at_samples()
        if len(self.val) != evaluations or self.generation != generation:
            self._explain()
        if self.error != error or len(self.val) != evaluations:
            self.slow_version += 1

    def _look_at_settings(self) -> None:
        path = self.path / "config.toml"
        stamp = stamp_of(path)
        if stamp == self._settings_stamp:
            return
        self.slow_version += 1
        self.config, self._band = None, None
        self._settings_stamp = stamp
        if stamp is None:
            return
        try:
            self.config = from_settings(read_toml(str(path)))
            self._band = band_of_run(self.path)
        except (UserError, OSError) as error:
            self.error = str(error)
            self._settings_stamp = ()  # look again

    def _look_at_record(self) -> None:
        path = self.path / NAME
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                stamp = (found.st_size, found.st_mtime_ns)
                if self.there and stamp == self._stamp and found.st_ino == self._inode:
                    return
                file.seek(max(0, self._offset - len(self._tail)))
                replaced = found.st_ino != self._inode or found.st_size < self._offset
                if self.there and (replaced or file.read(len(self._tail)) != self._tail):
                    self._forget()
                self.there, self._stamp, self._inode = True, stamp, found.st_ino
                self.changed_at = found.st_mtime
                file.seek(self._offset)
                self._read(file)
        except (FileNotFoundError, NotADirectoryError):
            if self.there:
                self._forget()
        except OSError as error:
            self.error = f"{path}: cannot be read ({error.strerror})"

    def _read(self, file: Any) -> None:
        """Take in the whole lines from here on; a torn last one waits for its end."""
        rest = b""
        while block := file.read(BLOCK):
            whole, end, rest = (rest + block).rpartition(b"\n")
            if not end:
                if len(rest) > BLOCK:
                    raise OSError(None, "a line of more than 4 MiB")
                continue
            self._offset += len(whole) + 1
            self._tail = (self._tail + whole + end)[-TAIL:]
            for row in rows_in(whole):
                self._add(row)

    def _add(self, row: Row) -> None:
        self.last = row
        if row["split"] == "val":
            self.val.append(row)
            self._rows.append(row)
            return
        values = [row[key] for key in COLUMNS]
        for curve in self.curves.values():
            curve.add(values)
        self.recent.append(values)
        if self.count % self._every == 0 or row.get("spikes"):
            self._rows.append(row)
            if len(self._rows) > ROWS + len(self.val):
                kept = iter(range(len(self._rows)))
                self._rows = [r for r in self._rows if r["split"] == "val" or r.get("spikes") or next(kept) % 2 == 0]
                self._every *= 2
        self.count += 1

    def _look_at_samples(self) -> None:
        path = self.path / "samples.txt"
        stamp = stamp_of(path)
        if stamp == self._samples_stamp:
            return
        self._samples_stamp = stamp
        before = self.samples
        try:
            text = path.read_text(encoding="utf-8", errors="replace") if stamp else ""
        except OSError:
            text = ""
        self.samples = evenly(samples_in(text, self.val), SAMPLES)
        self.slow_version += self.samples != before

    def _explain(self) -> None:
        """Verdicts, where the run is 1 % longer than when they were last made."""
        step = self.last["step"] if self.last else 0
        if self.config is None or not self._rows or step < 1.01 * self._explained:
            return
        self._explained = step
        try:
            self.verdicts = explain(self._rows, self.config, self._band)
        except (ArithmeticError, ValueError) as error:  # a record that no run of ours wrote
            self.verdicts = [f"no verdict: {error}"]

    def fast(self) -> dict[str, Values]:
        """The training curves by name, each as its columns `COLUMNS`."""
        return {key: columns(curve.rows()) for key, curve in self.curves.items()}

    def newest(self, count: int) -> Values:
        """The columns of the newest `count` training rows."""
        return columns(list(self.recent)[-count:] if count else [])

    def pace(self) -> dict[str, float | None]:
        """Where the run is, tokens per second lately, and the seconds left (evaluations counted in)."""
        step = self.last["step"] if self.last else None
        timed = [row for row in self.recent if row[2] is not None]
        speeds = [row[5] for row in list(self.recent)[-10:] if row[5] is not None]
        left = None
        if self.config and step is not None and len(timed) > 1 and timed[-1][0] != timed[0][0]:
            per_step = (timed[-1][2] - timed[0][2]) / (timed[-1][0] - timed[0][0])  # type: ignore[operator]
            left = max(0.0, (self.config.max_steps - step) * per_step)
            if self.config.max_time is not None:
                left = max(0.0, min(left, self.config.max_time - timed[-1][2]))  # type: ignore[operator]
        return {
            "step": step,
            "tokens": self.last["tokens"] if self.last else None,
            "seconds": self.last["seconds"] if self.last else None,
            "tokens_per_second": sorted(speeds)[len(speeds) // 2] if speeds else None,
            "seconds_left": left,
            "changed_at": self.changed_at or None,
        }

    def slow(self) -> dict[str, Any]:
        """All but the training curves: what changes with evaluations and settings."""
        config, low = self.config, best(self.val)
        weights = [name for name, file in (("best", "best.pt"), ("last", "model.pt")) if (self.path / file).is_file()]
        return {
            "name": self.name,
            "there": self.there,
            "error": self.error,
            "settings": {key: str(value) for key, value in to_settings(config).items()} if config else {},
            "max_steps": config.max_steps if config else None,
            "tokens_per_step": config.tokens_per_step if config else None,
            "prompt": config.sample_prompt if config else None,
            "landmarks": landmarks(config.model.vocab_size) if config else [],
            "schedule": schedule_points(config) if config else [],
            "val": [
                [row[key] for key in ("step", "tokens", "seconds", "loss", "bits_per_byte")]
                for row in thinned_evaluations(self.val)
            ],
            "band": [list(self._band.steps), list(self._band.mean), list(self._band.half)] if self._band else None,
            "best": low["step"] if low else None,
            "overfits_since": overfits_since(self._rows),
            "verdicts": self.verdicts,
            "samples": self.samples,
            "weights": weights,
        }


def stamp_of(path: Path) -> tuple[int, ...] | None:
    """What differs when a file was written; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


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


def columns(rows: Values) -> Values:
    """Rows of `COLUMNS`, turned; shortened to six digits, which is what a hover shows."""
    turned = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in COLUMNS]
    return turned[:3] + [[None if v is None else float(f"{v:.6g}") for v in column] for column in turned[3:]]


def evenly(items: list[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spread, the first and last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def thinned_evaluations(val: list[Row]) -> list[Row]:
    """At most about `POINTS` evaluations, the best among them."""
    if len(val) <= POINTS:
        return val
    keep, low = {id(row) for row in evenly(val, POINTS)}, best(val)
    return [row for row in val if id(row) in keep or row is low]


def samples_in(text: str, val: list[Row]) -> list[dict[str, Any]]:
    """The samples of samples.txt: {step, text}. A header is one only if its step comes after the one before and its
    loss is what the record says of that step: a sample may hold a line that looks the same.
    """
    known = {row["step"]: f"{row['loss']:.4f}" for row in val if row["loss"] is not None}
    heads, before = [], -1
    for match in HEADER.finditer(text):
        step = int(match[1])
        if (
            step > before
            and known.get(step) == match[2]
            and (match.start() == 0 or text[: match.start()][-2:] == "\n\n")
        ):
            heads.append((step, match.start(), match.end()))
            before = step
    ends = [start for _, start, _ in heads[1:]] + [len(text)]
    return [
        {"step": step, "text": text[after + 1 : end].removesuffix("\n\n")[:SAMPLE_LENGTH]}
        for (step, _, after), end in zip(heads, ends, strict=True)
    ]


def landmarks(vocab_size: int) -> list[dict[str, Any]]:
    """The chapter's losses to compare with, highest first."""
    return [
        {"name": name, "loss": math.log(vocab_size) / share, "meaning": meaning}
        for (share, name), meaning in zip(LANDMARKS, MEANINGS, strict=True)
    ]


def schedule_points(config: TrainConfig) -> list[list[float]]:
    """About 200 points (step, learning rate) of a schedule, its corners among them."""
    last = config.max_steps
    steps = {0, config.warmup, last, *(round(i * last / 200) for i in range(201))}
    steps |= {round(i * config.warmup / 20) for i in range(21)}
    return [[step, lr_at(step, config)] for step in sorted(steps)]


def names_of(paths: Sequence[Path]) -> list[str]:
    """What to call each folder: its name, or its path where two have the same."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]
