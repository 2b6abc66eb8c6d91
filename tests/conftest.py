"""What several tests use: a small text, and the commands as a person types them."""

import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm import storage
from llm.commands.main import main
from llm.config import TrainConfig, from_settings
from llm.plan import timing
from llm.record.metrics import Record
from llm.record.samples import Samples
from llm.start.new_run import new_run
from llm.storage import filesystem_limits
from llm.train import train
from llm.training.events import Event, Step
from llm.training.live import LiveRun

for number in (signal.SIGINT, signal.SIGHUP):  # ignored below `nohup` or a shell's `&`, and by all that we would start
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
# The files that take longest, each on one tester: they start first, so that none of them is left alone at the end.
LONGEST = (
    *("test_readme", "test_torchrun", "test_ranks", "test_rehearse", "test_distributed", "test_runs", "test_hosts"),
    *("test_browser", "test_storage_faults", "test_change_it", "test_export_hf", "test_commands", "test_trackers"),
    *("test_train", "test_trials", "test_teacher", "test_export_html", "test_chapter"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


torch.set_num_threads(1)  # tiny models: a second thread costs more than it brings
ROOT = Path(__file__).parent.parent
CACHE = os.environ.get("LOSSCURVE_CACHE", "")
MOMENT, MEDIAN = 0.05, timing._median_seconds  # seconds; what measures a pace
SMALL = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "batch_size": 4,
    "max_steps": 12,
    "eval_every": 4,
    "log_every": 2,
    "warmup_steps": 2,
    "max_lr": 1e-2,
    "sample_tokens": 5,
    "tokenizer": "char",
    "dtype": "float32",  # the same on every machine
}
needs_shakespeare = pytest.mark.skipif(
    not (Path(CACHE) / "tinyshakespeare" / "input.txt").is_file(), reason="tiny Shakespeare is not in LOSSCURVE_CACHE"
)
needs_gpt2 = pytest.mark.skipif(
    not (Path(CACHE) / "tiktoken").is_dir(), reason="GPT-2's vocabulary is not in LOSSCURVE_CACHE"
)


def words(count: int, seed: int = 0) -> str:
    """A text that can be learned: words of a small language with Zipf's frequencies."""
    draw = np.random.default_rng(seed)
    lexicon = ["".join(draw.choice(list("abcdefghij"), size=draw.integers(2, 7))) for _ in range(60)]
    ranks = np.minimum(draw.zipf(1.4, count) - 1, 59)
    return " ".join(lexicon[rank] + ("\n" if i % 9 == 8 else "") for i, rank in enumerate(ranks)) + "\n"


def append(run_dir: Path, **row: object) -> None:
    """A row at the end of a run's record."""
    record = Record(run_dir)
    record.add(**row)
    record.catch_up()


def write_samples(run_dir: Path, *samples: tuple[int, float, str], prompt: str = "") -> None:
    """Replace the samples of a run: (step, validation loss, text) each."""
    (run_dir / "samples.jsonl").unlink(missing_ok=True)
    written = Samples(run_dir)
    for step, loss, text in samples:
        written.add(step=step, val_loss=loss, prompt=prompt, text=text)
    written.catch_up()


def trained(config: TrainConfig, **kwargs: Any) -> tuple[LiveRun, list[Event]]:
    """A run of `config` to its end, and all that it yielded."""
    with new_run(config, **kwargs) as run:
        return run, list(train(run))


def config_for(here: Path, **settings: object) -> TrainConfig:
    """The small settings on the text of `here`."""
    return from_settings(SMALL | {"text": str(here / "text.txt"), "data_dir": str(here / "data")} | settings)


def steps_in(events: list[Event]) -> list[Step]:
    return [event for event in events if isinstance(event, Step)]


def environment() -> dict[str, str]:
    """For a process of its own: the modules that are found here, the package first, and one thread, as here."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def check_page(command: list[str | Path], folder: Path, environment: dict[str, str]) -> None:
    """Check that `command` serves a page until Ctrl-C."""
    server = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://127\.0\.0\.1:\S+", server.stdout.readline())[0]
        with urllib.request.urlopen(address) as page:
            assert b"losscurve" in page.read()
        server.send_signal(signal.SIGINT)
        assert server.wait(10) in (0, 130)
    finally:
        server.kill()
        server.communicate()


@pytest.fixture(autouse=True)
def nothing_noted():
    """What a test lets a file system lack is nothing to the next test."""
    yield
    filesystem_limits._recorded.clear()
    filesystem_limits._unreported.clear()


@pytest.fixture(autouse=True)
def blank_pictures(request, monkeypatch):
    """The commands of a test's own process write empty pictures, since to draw them takes longer than a small run.

    Tests with the mark `pictures` have them drawn, as all commands in processes of their own have.
    """

    def write_blank(draw: Callable[[], Any], out: Path) -> None:
        with storage.writing(out) as file:
            file.write(b"")

    if request.node.get_closest_marker("pictures") is None:
        for module in ("chart_style", "plot"):  # who imports it when it is needed, and who has imported it
            monkeypatch.setattr(f"llm.record.{module}.save_figure", write_blank)


@pytest.fixture(autouse=True)
def short_probes(monkeypatch):
    """A plan that a test makes in its own process measures this machine for a moment only."""
    monkeypatch.setattr(timing, "_median_seconds", lambda work, seconds: MEDIAN(work, min(seconds, MOMENT)))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder with a text in it, text.txt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(words(900), encoding="utf-8")
    return tmp_path


@pytest.fixture
def losscurve(capsys):
    """`losscurve("train --max_steps 3")` -> (exit code, stdout, stderr)."""

    def run(line: str) -> tuple[int, str, str]:
        code = main(line.split())
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def start():
    """`start("train --max_steps 3")`: a process of its own, which does not outlive the test."""
    started = []

    def run(line: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "llm", *line.split()]
        started.append(
            subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def flags(**settings: object) -> str:
    """The small settings as flags, with others over them."""
    return " ".join(f"--{name} {value}" for name, value in (SMALL | settings).items())


def run_python(line: str) -> None:
    """What a shell does with `python -c "…" ARGUMENTS`, in this process."""
    python, flag, code, *arguments = shlex.split(line)
    assert (python, flag) == ("python", "-c")
    assert not set("$`!\\") & set(line)  # which a shell would take for itself
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["-c", *arguments])
        exec(code, {})


def with_small(line: str) -> str:
    """A line of flags, with the small settings that it does not give itself."""
    typed = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in line.split()}
    return " ".join([*(f"--{name} {value}" for name, value in SMALL.items() if name not in typed), line])


def pytest_terminal_summary(terminalreporter):
    """A table of the faults that tests injected (their `record_property`), and of those survived."""
    counted, failed = Counter(), Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for kind, number in getattr(report, "user_properties", []) if report.when == "call" else []:
                counted[kind] += number
                failed[kind] += number if outcome == "failed" else 0
    if counted:
        terminalreporter.section("faults injected and survived")
        for kind, number in sorted(counted.items()):
            terminalreporter.write_line(f"{kind:<32}{number:>8}{number - failed[kind]:>8}")
