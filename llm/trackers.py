"""TensorBoard and W&B as views of a run: they are shown what stands in its metrics.jsonl and samples.jsonl.

The record is the truth. A view begins with its first row, also after a resume, and replaces what the tracker had of
this run before; so no row is missing, and none that was cut back stays. Beside a training a view lives in a thread of
its own that reads the record as it grows: whatever a tracker does, training neither waits for it nor ends by it.
"""

import hashlib
import html
import json
import math
import netrc
import os
import shlex
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from llm import metrics, storage
from llm.config import TrainConfig, to_settings
from llm.errors import Failure, UserError
from llm.lines import Row
from llm.samples import read_samples

SECONDS = 1.0  # between two looks at the record
PATIENCE = 30.0  # seconds that a tracker has to finish, once the training has
Say = Callable[[str], None]


class Tracker(Protocol):
    """What shows a run. Anything it raises ends the view, and only that."""

    where: str  # in words, how to look at it

    def row(self, row: Row) -> None: ...
    def sample(self, step: int, text: str) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


Start = Callable[[Path, TrainConfig, Row], Tracker]  # run folder, settings, first validation row


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


def scalars(row: Row) -> dict[str, float]:
    """The numbers of a row by the names that trackers show them under; what an evaluation shares with the training
    row of its step is shown once.
    """
    split = row["split"]
    keys = ("loss", "bits_per_byte") if split == "val" else metrics.NUMBERS
    named = {f"{key}/{split}" if key in ("loss", "bits_per_byte") else key: row.get(key) for key in keys}
    named |= {key: len(row[key]) for key in ("refused", "spikes") if isinstance(row.get(key), list)}
    return {key: value for key, value in named.items() if isinstance(value, (int, float)) and math.isfinite(value)}


def hyperparameters(config: TrainConfig) -> dict[str, Any]:
    """The settings as plain values."""
    return {key: " ".join(v) if isinstance(v, tuple) else v for key, v in to_settings(config).items()}


def with_tensorboard(say: Say) -> Start:
    """TensorBoard: event files in the run's tensorboard/. Raises ImportError."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    class Events:
        def __init__(self, run_dir: Path, config: TrainConfig, first: Row) -> None:
            folder, record = run_dir / "tensorboard", run_dir / metrics.NAME
            for old in sorted(folder.glob("events.out.tfevents.*"))[:-1]:  # a TensorBoard may be reading the newest
                old.unlink()
            self.where = f"tensorboard --logdir {shlex.quote(str(folder))}"
            # from step 0 on, this file takes the place of those before it
            self._writer = SummaryWriter(str(folder), purge_step=0)
            # its clock: when the row was reached, had the run never been stopped
            seconds = max(row["seconds"] or 0.0 for row in metrics.read_record(run_dir))
            self._began = record.stat().st_mtime - seconds
            self._now = self._began
            for summary in hparams(hyperparameters(config), {"loss/val": 0.0, "bits_per_byte/val": 0.0}):  # type: ignore[no-untyped-call]
                self._writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]

        def row(self, row: Row) -> None:
            self._now = self._began + (row.get("seconds") or 0.0)
            for name, value in scalars(row).items():
                self._writer.add_scalar(name, value, row["step"], self._now)

        def sample(self, step: int, text: str) -> None:
            literal = "\n".join("    " + line for line in text.splitlines())  # code, in TensorBoard's Markdown
            self._writer.add_text("sample", literal, step, self._now)

        def flush(self) -> None:
            self._writer.flush()

        def close(self) -> None:
            self._writer.close()

    return Events


def with_wandb(say: Say) -> Start:
    """Weights & Biases: a run of the same name, in the run's wandb/ and, where the user has set W&B up, online.

    Raises ImportError, and UserError where W&B was asked to be online and has no key. Nothing is sent and nobody
    asked for a key otherwise: the run is written offline.
    """
    if os.path.expanduser("~") == "~":  # W&B looks for its settings there
        raise UserError("HOME is not set, and W&B needs a home folder for its settings; set it, such as HOME=/tmp")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's own reports of its crashes
    import wandb

    settings = wandb.setup().settings
    mode: Any = {"dryrun": "offline", "run": "online"}.get(settings.mode, settings.mode)
    if mode == "online" and not has_key(settings):
        if "WANDB_MODE" in os.environ:
            raise UserError("WANDB_MODE = online: W&B has no key here; run wandb login, or set WANDB_MODE=offline")
        say("W&B has no key here (wandb login gives it one), so this run is written offline and nothing is sent")
        mode = "offline"

    class WandB:
        def __init__(self, run_dir: Path, config: TrainConfig, first: Row) -> None:
            name = run_dir.resolve().name
            # the same for as long as this run is this run, so that a view takes the place of the one before;
            # the seconds that its first evaluation took are those of no other
            number = hashlib.sha256(json.dumps([name, first], sort_keys=True).encode()).hexdigest()[:16]
            for old in (run_dir / "wandb").glob(f"*run-*-{number}"):
                shutil.rmtree(old)
            self._run = wandb.init(
                dir=str(run_dir),
                id=number,
                project=settings.project or "losscurve",
                name=settings.run_name or name,
                config=hyperparameters(config),
                mode=mode,
                settings=wandb.Settings(silent=True, console="off", login_timeout=1.0),  # should it ask all the same
            )
            self._run.define_metric("loss/val", summary="min")
            self._step = 0
            if mode == "offline":
                self.where = f"offline; to send it: wandb sync {shlex.quote(str(Path(self._run.dir).parent))}"
            else:
                self.where = self._run.url or f"nothing is kept ({mode})"

        def row(self, row: Row) -> None:
            self._step = row["step"]
            self._run.log(scalars(row), step=self._step)

        def sample(self, step: int, text: str) -> None:
            page = f"<p>step {step}</p><pre>{html.escape(text)}</pre>"
            self._run.log({"sample": wandb.Html(page, inject=False)}, step=self._step)  # W&B takes no step back

        def flush(self) -> None: ...  # W&B does so in its own time

        def close(self) -> None:
            self._run.finish()

    return WandB


def has_key(settings: Any) -> bool:
    """Whether W&B, with these settings, finds something to log in with: where it looks itself, without asking."""
    if settings.api_key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    own = os.environ.get("NETRC")
    places = [own] if own else [os.path.expanduser("~/.netrc"), os.path.expanduser("~/_netrc")]
    try:
        known = netrc.netrc(next(place for place in places if os.path.isfile(place)))
    except (StopIteration, OSError, netrc.NetrcParseError):
        return False
    return known.authenticators(urlsplit(settings.base_url).netloc) is not None
