"""Every diff of docs/change-it.md applies to the package, and its commands show what the page says of them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open

PAGE = (ROOT / "docs" / "change-it.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


class Changed(NamedTuple):
    """A copy of the package with one diff applied, after the commands of its section."""

    folder: Path
    printed: list[str]  # stdout of each command


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def apply(diff: str, folder: Path) -> None:
    """Apply a diff as a reader does. Fail with git's reason where a line that it depends on has changed."""
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}  # or git looks for a repository above
    found = subprocess.run(
        ["git", "apply"], input=diff, cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, f"docs/change-it.md: a diff no longer applies; write it anew\n{found.stderr}"


def run(command: str, folder: Path) -> str:
    """Run a command of the page with the package in `folder`; return its stdout."""
    program, *words = shlex.split(command)
    assert program == "losscurve"
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-m", "llm", *words], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.fixture
def changed(tmp_path):
    """`changed("A norm")`: apply the diff of that section to a copy of the package, and run its commands."""

    def change(title: str) -> Changed:
        for name in ("llm", "scripts"):
            # other test processes write their bytecode under such names and rename it
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.pyc.*"))
        shutil.copy(ROOT / "README.md", tmp_path)
        [settings] = blocks(PAGE, "toml")
        (tmp_path / "tiny.toml").write_text(settings, encoding="utf-8")
        [diff] = blocks(SECTIONS[title], "diff")
        apply(diff, tmp_path)
        [commands] = blocks(SECTIONS[title], "sh")
        return Changed(tmp_path, [run(command, tmp_path) for command in commands.splitlines()])

    return change


def test_the_schedule_sets_the_learning_rate_of_each_step(changed):
    folder, printed = changed("A schedule")
    rows = map(json.loads, (folder / "runs/sqrt/metrics.jsonl").read_text(encoding="utf-8").splitlines())
    rates = {row["step"]: row["lr"] for row in rows}
    assert [rates[step] for step in (1, 4, 9)] == pytest.approx([3e-4, 1.5e-4, 1e-4])
    assert "9.045e-05" in printed[0]
    assert (folder / "schedule.png").exists()


def test_the_norm_has_no_bias(changed):
    folder, _ = changed("A norm")
    names = torch.load(folder / "runs/rmsnorm/model.pt", weights_only=True).keys()
    assert {"h.0.ln_1.weight", "h.1.ln_2.weight", "ln_f.weight"} <= names
    assert not {"h.0.ln_1.bias", "h.1.ln_2.bias", "ln_f.bias"} & names


def test_the_optimizer_is_in_the_checkpoint(changed):
    folder, _ = changed("An optimizer")
    assert 'optimizer = "sgd"' in (folder / "runs/sgd/config.toml").read_text(encoding="utf-8")
    with safe_open(folder / "runs/sgd/step-000011/optimizer.safetensors", "pt") as state:
        assert state.get_tensor("momentum_buffer.lm_head.weight").abs().max() > 0
        assert not [name for name in state.keys() if name.startswith("exp_avg")]  # noqa: SIM118


def test_the_listener_writes_a_line_for_each_evaluation(changed):
    folder, _ = changed("A listener")
    lines = [line.split() for line in (folder / "runs/listener/losses.txt").read_text(encoding="utf-8").splitlines()]
    rows = map(json.loads, (folder / "runs/listener/metrics.jsonl").read_text(encoding="utf-8").splitlines())
    evaluated = [(row["step"], row["loss"]) for row in rows if row["split"] == "val"]
    assert [(int(step), float(loss)) for step, loss in lines] == evaluated
    assert [step for step, _ in evaluated] == [0, 5, 10, 11]


def test_the_command_counts_tokens(changed):
    folder, [printed] = changed("A command")
    text = (folder / "README.md").read_text(encoding="utf-8")
    counts = dict(line.split() for line in printed.splitlines())
    assert counts["byte"] == f"{len(text.encode()):,}"
    assert counts["char"] == f"{len(text):,}"
    assert 0 < int(counts["bpe"].replace(",", "")) < len(text)


def test_a_diff_that_no_longer_applies_is_noticed(tmp_path):
    (tmp_path / "a.py").write_text("one\nfour\nthree\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="patch does not apply"):
        apply("--- a/a.py\n+++ b/a.py\n@@ -1,3 +1,3 @@\n one\n-two\n+2\n three\n", tmp_path)


def test_every_section_with_a_diff_has_a_test():
    source = Path(__file__).read_text(encoding="utf-8")
    for title, section in SECTIONS.items():
        assert bool(blocks(section, "diff")) == (f'changed("{title}")' in source.partition("def test_")[2])


def test_every_file_that_the_page_names_exists():
    named = re.findall(r"`((?:llm|tests)/[^`]*)`", PAGE)
    assert len(named) > 15
    assert not [path for path in named if not (ROOT / path).exists() and f"+++ b/{path}" not in PAGE]
