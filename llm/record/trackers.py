"""TensorBoard and W&B as views of a run: they are shown what stands in metrics.jsonl and samples.jsonl.

A tracker never ends or holds up a run, and a resume does not double what it shows.
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


PATIENCE = 30.0  # seconds that a tracker has to finish, once the training has


def starts(words: Iterable[str], say: Say) -> dict[str, Start]:
    """How to start each tracker named in `words` ("tensorboard", "wandb", several with commas), its package imported.

    Raises UserError for another name, a package that is missing and a W&B that cannot work; `say` is told what is
    not as one might expect.
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
            raise UserError(f'{name} cannot be used ({_cause(error)}); pip install "losscurve[{name}]"') from None
        except Exception as error:  # of a package that is too old or broken, or of a machine that is not as it expects
            cure = f'fix this, or where the package is broken: pip install --upgrade "losscurve[{name}]"'
            raise UserError(f"{name} does not start ({_cause(error)}); {cure}") from None
    return found


def replay(run_dir: Path, config: TrainConfig, name: str, start: Start) -> str:
    """Show all that is recorded of a run; returns where to look at it.

    Raises UserError as `read_record` does, or while the tracker is following the run, and Failure where it fails.
    """
    metrics.read_record(run_dir)
    with storage.locked(run_dir / name, f"its {name} folder"):
        view = View(run_dir, config, start)
        try:
            view.look()
            view.close()
        except Exception as error:  # whatever a tracker can do
            raise Failure(f"{name}: {_cause(error)}; mend that and try again") from None
    if view.where is None:
        raise UserError(f"{run_dir}: no evaluation is recorded yet; try again after the first")
    return view.where


@contextmanager
def following(found: dict[str, Start], run_dir: Path, config: TrainConfig, warn: Say, note: Say) -> Iterator[None]:
    """Trackers that follow the run in `run_dir` while the block trains it, each in a thread.

    One that fails, or has not finished PATIENCE after the block, is warned of once. `note` is told where to look.
    """
    ended = threading.Event()
    threads = {
        name: threading.Thread(
            target=_follow, args=(name, View(run_dir, config, start), ended, warn, note), name=name, daemon=True
        )
        for name, start in found.items()
    }
    for thread in threads.values():
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for name, thread in threads.items():
            thread.join(PATIENCE)
            if thread.is_alive():
                warn(f"{name} does not finish; it is left behind. {_again(name, run_dir)}")


def _follow(name: str, view: "View", ended: threading.Event, warn: Say, note: Say) -> None:
    try:
        with storage.locked(view.run_dir / name, f"its {name} folder"):
            told = None
            while True:
                last = ended.wait(SECONDS)  # asked first, so that the last look sees everything
                view.look()
                if view.where and view.where != told:  # begun, perhaps anew
                    told = view.where
                    note(f"{name}: {told}")
                if last:
                    break
            view.close()
    except BaseException as error:  # W&B may even raise SystemExit
        warn(f"{name} failed, and training goes on without it ({_cause(error)}). {_again(name, view.run_dir)}")


def _again(name: str, run_dir: Path) -> str:
    return f"The record has everything: losscurve track {shlex.quote(str(run_dir))} --to {name}"


def _cause(error: BaseException) -> str:
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:300].removesuffix(":")


class View:
    """What one tracker is shown of the run in `run_dir`. `where` says how to look at it, once it has begun."""

    def __init__(self, run_dir: Path, config: TrainConfig, start: Start) -> None:
        self.run_dir, self.config, self._start = run_dir, config, start
        self.where: str | None = None
        self._tracker: Tracker | None = None
        self._at, self._last = 0, b""  # bytes read of the record, and the last line among them
        self._rows: list[Row] = []  # read, and waiting for a tracker
        self._evaluations: list[Row] = []
        self._sampled = -1  # step of the last sample shown

    def look(self) -> None:
        """Show what is new; a record that was cut back is shown anew, from its first row."""
        if self._read():
            self.close()
            self._evaluations, self._sampled = [], -1
        self._evaluations += [row for row in self._rows if row["split"] == "val"]
        if not self._evaluations:
            return
        if self._tracker is None:
            self._tracker = self._start(self.run_dir, self.config, self._evaluations[0])
            self.where = self._tracker.where
        samples = self._new_samples()
        for row in self._rows:
            self._tracker.row(row)
            if row["split"] == "val" and row["step"] in samples:  # in the order of their steps, where both are there
                self._tracker.sample(row["step"], samples.pop(row["step"]))
        for step, text in samples.items():
            self._tracker.sample(step, text)
        self._rows = []
        self._tracker.flush()

    def close(self) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.close()

    def _read(self) -> bool:
        """Read the rows that are new; whether the record is another than the one read so far."""
        try:
            file = open(self.run_dir / metrics.NAME, "rb")  # noqa: SIM115
        except FileNotFoundError:  # before the first evaluation
            return False
        with file:
            file.seek(self._at - len(self._last))
            anew = file.read(len(self._last)) != self._last
            if anew:
                file.seek(0)
                self._at, self._rows = 0, []
            whole = file.read().rpartition(b"\n")[0]  # a torn last line waits for its end
        lines = [line + b"\n" for line in whole.split(b"\n")] if whole else []
        self._at += sum(map(len, lines))
        self._last = lines[-1] if lines else b"" if anew else self._last
        absent = dict.fromkeys(metrics.NUMBERS)
        self._rows += [absent | json.loads(line) for line in lines if line.strip()]
        return anew

    def _new_samples(self) -> dict[int, str]:
        """Return by step the samples that were not shown yet, of evaluations that the record has."""
        known = {row["step"] for row in self._evaluations}
        found = [
            sample for sample in read_samples(self.run_dir) if sample.step in known and sample.step > self._sampled
        ]
        self._sampled = max((sample.step for sample in found), default=self._sampled)
        return {sample.step: sample.prompt + sample.text for sample in found}
