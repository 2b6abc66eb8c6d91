"""A run folder as an object, and `fit` for notebooks."""

import contextlib
import html
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Unpack

from llm.arch import Model
from llm.config import (
    FIELDS,
    TrainConfig,
    check_path,
    differing_settings,
    expanded,
    given_names,
    over_preset,
    read_toml,
)
from llm.config.in_python import in_python, words_of_python
from llm.errors import Failure, UserError
from llm.generate import Knobs, write
from llm.machine.device import choose_device
from llm.plan.autopilot import Choice, choose_new_run
from llm.plan.choice_lines import choice_lines
from llm.plan.request import read_request
from llm.record import metrics
from llm.record.chart_style import data_url, plain, png_of
from llm.record.plot import draw, plot_runs
from llm.record.samples import Sample, read_samples
from llm.start.new_run import new_run
from llm.start.resume_run import resume_run
from llm.start.run_folder import Say, once
from llm.storage.lines import Row
from llm.tokens.bpe import gpt2
from llm.tokens.saved_tokenizer import load_tokenizer
from llm.tokens.token_files import GPT2_VOCAB
from llm.tokens.tokenizer import Tokenizer
from llm.train import train
from llm.training.events import Line, Notice
from llm.training.live import Deadline
from llm.weights import load_model, run_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL = 'style="text-align: left; vertical-align: top"'
SHOWN = 2000  # characters of a sample in a notebook


@dataclass(frozen=True)
class Run:
    """A run folder: its settings, record, weights and tokenizer."""

    path: Path
    config: TrainConfig

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Return the run in the folder `path`. Raises UserError if there is none."""
        check_path("path", str(path))
        folder = Path(expanded(str(path)))
        return cls(folder, run_config(folder))

    @property
    def record(self) -> list[Row]:
        """Return the rows of metrics.jsonl."""
        return metrics.read_record(self.path)

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the run; GPT-2's if the run's token files came without one.

        Raises UserError if they did, and its tokens are fewer than GPT-2's.
        """
        path = self.path / "tokenizer.json"
        if path.exists():
            return load_tokenizer(path)
        tokens = self.config.model.vocab_size
        if tokens < GPT2_VOCAB:
            raise UserError(
                f"{self.path}: has no tokenizer.json, and its {tokens} tokens are not GPT-2's; put the tokenizer.json "
                "of its text there"
            )
        return gpt2()

    def model(self, weights: str = "last", device: str = "auto") -> Model:
        """Return the trained model with the "last" or the "best" weights, in evaluation mode."""
        names = {"last": "model.pt", "best": "best.pt"}
        if weights not in names:
            raise UserError(f"weights = {weights!r}: expected last or best")
        return load_model(self.path / names[weights], choose_device(device), self.config.model)

    def sample(
        self,
        prompt: str | None = None,
        max_new_tokens: int = 100,
        seed: int | None = None,
        weights: str = "last",
        *,
        stop: str | Sequence[str] = (),
        ignore_end: bool = False,
        **knobs: Unpack[Knobs],
    ) -> str:
        """Return `prompt` (default: the run's own) and its continuation by the "last" or "best" weights.

        The knobs, as in `losscurve sample`: temperature, top_k, top_p, min_p, repetition_penalty. Raises UserError.
        """
        prompt = prompt if prompt is not None else self.config.sample_prompt or "\n"
        pieces = write(self.model(weights), self.tokenizer, prompt, max_new_tokens, seed, 1, stop, ignore_end, **knobs)
        return prompt + "".join(piece for (piece,) in pieces)

    @property
    def samples(self) -> list[Sample]:
        """Return the samples that the run drew at its evaluations, oldest first."""
        return read_samples(self.path)

    def changed(self) -> dict[str, Any]:
        """Return the settings that differ from the defaults, except the run's folders."""
        return differing_settings(self.config, ignored=("out_dir", "data_dir"))

    def _repr_png_(self) -> bytes:
        """Return the loss curve as PNG, for front ends that show only pictures."""
        return png_of(draw([self.path]))

    def _repr_html_(self) -> str:
        """Return what a notebook shows: losses, loss curve, settings that differ from the defaults, last sample."""
        rows, samples = self.record, self.samples
        low, evaluations = metrics.best(rows), metrics.losses(rows, "val")
        step = max((row["step"] for row in rows), default=0)
        facts = {"steps": f"{step:,} of {self.config.max_steps:,}"}
        if low:
            bits = "" if low["bits_per_byte"] is None else f", {low['bits_per_byte']:.3f} bits per byte"
            facts["best val loss"] = f"{low['loss']:.4f} nats per token{bits}, at step {low['step']:,}"
            facts["last"] = f"{evaluations[-1][1]:.4f} at step {evaluations[-1][0]:,}"
        words = {name: " ".join(v) if isinstance(v, tuple) else str(v) for name, v in self.changed().items()}
        words = {name: value if value.isprintable() else repr(value) for name, value in words.items()}
        facts["not as by default"] = ", ".join(f"{name} {value}" for name, value in words.items()) or "nothing"
        told = "".join(
            f"<tr><th {CELL}>{key}</th><td {CELL}>{html.escape(value)}</td></tr>" for key, value in facts.items()
        )
        name = html.escape(plain(self.path.resolve().name, 80))
        shown = [
            f"<h3>{name}</h3><table>{told}</table>",
            f'<img alt="loss curve of {name}" style="width: 45em" src="{data_url(draw([self.path]))}">',
        ]
        for sample in samples[-1:]:
            text = html.escape((sample.prompt + sample.text)[:SHOWN])
            shown.append(f'<p>sample at step {sample.step:,}:</p><pre style="white-space: pre-wrap">{text}</pre>')
        return "".join(shown)

    def plot(self, out: str | Path | None = None) -> "Figure":
        """Return the loss curve as a figure, which a notebook shows; write it to `out` too, if given."""
        if out is not None:
            plot_runs([self.path], Path(expanded(str(out))))
        return draw([self.path])


def fit(
    text: str | Path | list[str | Path] | None = None,
    *,
    out_dir: str | Path = "checkpoints",
    preset: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    time: str | None = None,
    say: Say = print,
    **settings: Any,
) -> Run:
    """Train on a text (a path, several, or "shakespeare") and return the run; for notebooks.

    `settings` are the fields of `TrainConfig` and `GPTConfig`; `say` gets a line for each evaluation. With `time`, such
    as "10m", the run is chosen for that time, around the given settings; where a text would be read often, teachers
    are trained first, in folders OUT_DIR-teacher. After an interrupt the run saves and ends;
    `resume=True` continues it. Raises UserError for settings that cannot work, Failure if it cannot go on or be saved.
    """
    given = settings | ({} if text is None else {"text": text}) | {"out_dir": expanded(str(out_dir))}
    with words_of_python():
        return _fit(given, preset, resume, overwrite, time, say)[0]


def _fit(
    given: dict[str, Any], preset: str | None, resume: bool, overwrite: bool, time: str | None, say: Say
) -> tuple[Run, bool]:
    """Return the run of `fit`, and whether it was interrupted."""
    began = perf_counter()
    out_dir = given["out_dir"]
    tell = once(lambda line: say(in_python(line)))
    deadline: Deadline | None = None
    if resume and time is not None:
        raise UserError("time is for a new run; to continue one, leave it out")
    if resume and (preset or overwrite):
        raise UserError("resume uses the settings of the run itself; leave out preset and overwrite")
    if resume:
        opened = resume_run(Path(out_dir), given, say=tell)
    else:
        base = read_toml(preset) if preset else {}
        if time is None:
            config, names = over_preset(base, given, tell), given_names(base, given)
        else:
            choice = choose_new_run(read_request(time, base, given, tell), overwrite, tell)
            if choice.calls_for_teachers:
                return _fit_all(given, preset, overwrite, choice, began, say)
            say("\n".join(choice_lines(choice)))
            config, names = choice.proposal.config, set(FIELDS)
            deadline = choice.deadline(began)
        opened = new_run(config, overwrite=overwrite, say=tell, given=names)
    with opened as training, interrupts() as caught:
        training.stop = lambda: bool(caught)
        training.deadline = deadline
        if training.fine_tuning_line:
            tell(training.fine_tuning_line)
        for event in train(training):
            if isinstance(event, Line):
                say(str(event))
            elif isinstance(event, Notice):
                say(in_python(f"warning: {event.text}"))
    if training.unsaved:
        raise Failure(f"the last save failed: {training.unsaved}; free some disk space, then continue with resume=True")
    if training.reason == "interrupted":
        say(f"saved step {training.progress.step}; continue with fit(out_dir={str(out_dir)!r}, resume=True)")
    return Run.open(out_dir), bool(caught)


def _fit_all(
    given: dict[str, Any], preset: str | None, overwrite: bool, choice: Choice, began: float, say: Say
) -> tuple[Run, bool]:
    """Train the teachers for a part of the time, then the run that learns from them too, and return that one.

    Returns a teacher if it was interrupted.
    """
    *teachers, last = choice.timed_runs(overwrite)
    say(choice.teacher_words(teachers))
    for number, run in enumerate(teachers, 1):
        teacher, was_interrupted = _fit(given | run.settings, preset, False, overwrite, f"{run.seconds:.0f}", say)
        if was_interrupted:
            for rest in (*teachers[number:], last):
                options = {"time": f"{max(1.0, rest.seconds):.0f}", "preset": preset, "overwrite": overwrite}
                asked = given | rest.settings | {name: value for name, value in options.items() if value}
                words = ", ".join(f"{name}={value!r}" for name, value in asked.items())
                say(f"after that, train the run with fit({words})")
            return teacher, True
    left = max(1.0, choice.seconds - (perf_counter() - began))
    return _fit(given | last.settings, preset, False, overwrite, f"{left:.0f}", say)


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Yield a list that receives the first SIGINT (Ctrl-C), SIGTERM or SIGHUP. A second signal exits at once, except
    under torchrun.

    Ignored signals (nohup) stay ignored. Outside the main thread, where Python allows no signal handlers, none are
    set.
    """
    caught: list[int] = []

    def note(number: int, frame: object) -> None:
        if caught and "RANK" in os.environ:  # torchrun and a scheduler may both send one; torchrun kills late processes
            return
        if caught:
            os._exit(128 + number)
        caught.append(number)
        with contextlib.suppress(OSError):  # the terminal may be closed
            again = "" if "RANK" in os.environ else " (again: leave at once)"
            if os.environ.get("RANK", "0") == "0":  # torchrun signals all processes
                print(f"finishing this step, then saving{again}", file=sys.stderr)

    wanted = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in wanted}
    if threading.current_thread() is not threading.main_thread():
        before = {}
    for number in [number for number, handler in before.items() if handler != signal.SIG_IGN]:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
