"""Show a run in TensorBoard and W&B, as views of its metrics.jsonl and samples.jsonl.

A tracker never stops or delays a run, and after a resume it shows each step once.
"""

import json
import shlex
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llm import storage
from llm.config import TrainConfig
from llm.errors import Failure, UserError
from llm.record import metrics
from llm.record.samples import read_samples
from llm.record.track_tensorboard import with_tensorboard
from llm.record.track_wandb import with_wandb
from llm.record.tracker import Say, Start, Tracker
from llm.storage.lines import Row

SECONDS = 1.0  # between two looks at the record
PATIENCE = 30.0  # seconds that a tracker has to finish after the training


def starts(words: Iterable[str], say: Say) -> dict[str, Start]:
    """Import each tracker named in `words` and return the function that starts it.

    Args:
        words: names ("tensorboard", "wandb"), or several names separated by commas.
        say: called with a notice if a tracker does not work as the user may expect.

    Raises:
        UserError: a name is unknown, a package is missing, or a tracker cannot work here.
    """
    known = {"tensorboard": with_tensorboard, "wandb": with_wandb}
    found: dict[str, Start] = {}
    for name in (name.strip() for word in words for name in word.split(",")):
        if name not in known:
            raise UserError(f"no tracker is called {name!r}; known: {', '.join(known)}")
        try:
            found[name] = known[name](say)
        except UserError:
            raise
        except ImportError as error:
            raise UserError(f'{name} cannot be imported ({_cause(error)}); pip install "losscurve[{name}]"') from None
        except Exception as error:  # an old or broken package, or something on this machine that it does not expect
            remedy = f'fix this, or if the package is broken: pip install --upgrade "losscurve[{name}]"'
            raise UserError(f"{name} does not start ({_cause(error)}); {remedy}") from None
    return found


def replay(run_dir: Path, config: TrainConfig, name: str, start: Start) -> str:
    """Show a whole recorded run in a tracker; return how to look at it, in words.

    Raises:
        UserError: the record cannot be read or has no evaluation, or the tracker is following the run.
        Failure: the tracker fails.
    """
    metrics.read_record(run_dir)
    with storage.locked(run_dir / name, f"its {name} folder"):
        view = View(run_dir, config, start)
        try:
            view.update()
            view.close()
        except Exception as error:  # a tracker may raise anything
            raise Failure(f"{name}: {_cause(error)}; fix this and retry") from None
    if view.where is None:
        raise UserError(f"{run_dir}: no evaluation is recorded yet; retry after the first one")
    return view.where


@contextmanager
def following(found: dict[str, Start], run_dir: Path, config: TrainConfig, warn: Say, note: Say) -> Iterator[None]:
    """Let trackers follow the run in `run_dir` during the block, each in a thread of its own.

    `warn` gets one line for a tracker that fails, or that does not finish within PATIENCE after the block. `note` gets
    how to look at the run.
    """
    ended = threading.Event()
    threads = {}
    for name, start in found.items():
        arguments = (name, View(run_dir, config, start), ended, warn, note)
        threads[name] = threading.Thread(target=_follow, args=arguments, name=name, daemon=True)
    for thread in threads.values():
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for name, thread in threads.items():
            thread.join(PATIENCE)
            if thread.is_alive():
                warn(f"{name} did not finish within {PATIENCE:g} s and is abandoned. {_replay_command(name, run_dir)}")


def _follow(name: str, view: "View", ended: threading.Event, warn: Say, note: Say) -> None:
    """Update the view until `ended` is set, and once after that."""
    try:
        with storage.locked(view.run_dir / name, f"its {name} folder"):
            noted = None
            while True:
                is_last = ended.wait(SECONDS)  # before the update, so that the last update sees all rows
                view.update()
                if view.where and view.where != noted:  # the tracker has started, or started again
                    noted = view.where
                    note(f"{name}: {noted}")
                if is_last:
                    break
            view.close()
    except BaseException as error:  # W&B may even raise SystemExit
        warn(
            f"{name} failed, and training continues without it ({_cause(error)}). {_replay_command(name, view.run_dir)}"
        )


def _replay_command(name: str, run_dir: Path) -> str:
    return f"The record is complete; to show it: losscurve track {shlex.quote(str(run_dir))} --to {name}"


def _cause(error: BaseException) -> str:
    """Return an exception as one short line."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:300].removesuffix(":")


class View:
    """One tracker's view of the run in `run_dir`. `where` says how to look at it, once the tracker has started."""

    def __init__(self, run_dir: Path, config: TrainConfig, start: Start) -> None:
        self.run_dir = run_dir
        self.config = config
        self.where: str | None = None
        self._start = start
        self._tracker: Tracker | None = None
        self._offset = 0  # bytes of the record that were read
        self._last_line = b""  # the last line that was read, to notice that the record was replaced
        self._rows: list[Row] = []  # read, but not shown yet
        self._evaluations: list[Row] = []
        self._last_sample = -1  # step of the last sample shown

    def update(self) -> None:
        """Show what is new. A record that was cut back is shown again, from its first row."""
        replaced = self._read()
        if replaced:
            self.close()
            self._evaluations = []
            self._last_sample = -1
        self._evaluations += [row for row in self._rows if row["split"] == "val"]
        if not self._evaluations:  # W&B derives the run's id from the first one
            return
        if self._tracker is None:
            self._tracker = self._start(self.run_dir, self.config, self._evaluations[0])
            self.where = self._tracker.where
        samples = self._new_samples()
        for row in self._rows:
            self._tracker.row(row)
            if row["split"] == "val" and row["step"] in samples:  # in the order of steps if both are there
                self._tracker.sample(row["step"], samples.pop(row["step"]))
        for step, text in samples.items():
            self._tracker.sample(step, text)
        self._rows = []
        self._tracker.flush()

    def close(self) -> None:
        """Close the tracker if it has started."""
        tracker = self._tracker
        self._tracker = None
        if tracker is not None:
            tracker.close()

    def _read(self) -> bool:
        """Read the new rows; return whether the record was replaced since the last call."""
        try:
            file = open(self.run_dir / metrics.NAME, "rb")  # noqa: SIM115
        except FileNotFoundError:  # before the first evaluation
            return False
        with file:
            file.seek(self._offset - len(self._last_line))
            replaced = file.read(len(self._last_line)) != self._last_line
            if replaced:
                file.seek(0)
                self._offset = 0
                self._last_line = b""
                self._rows = []
            complete = file.read().rpartition(b"\n")[0]  # an incomplete last line is read later
        lines = [line + b"\n" for line in complete.split(b"\n")] if complete else []
        self._offset += sum(map(len, lines))
        if lines:
            self._last_line = lines[-1]
        absent = dict.fromkeys(metrics.NUMBERS)
        self._rows += [absent | json.loads(line) for line in lines if line.strip()]
        return replaced

    def _new_samples(self) -> dict[int, str]:
        """Return, by step, the samples that were not shown yet and whose evaluation is in the record."""
        recorded = {row["step"] for row in self._evaluations}
        new = [
            sample
            for sample in read_samples(self.run_dir)
            if sample.step in recorded and sample.step > self._last_sample
        ]
        self._last_sample = max((sample.step for sample in new), default=self._last_sample)
        return {sample.step: sample.prompt + sample.text for sample in new}
