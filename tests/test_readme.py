"""Every command of the README and of docs/commands.md runs as typed; the long ones with smaller numbers."""

import io
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, check_page, environment, flags, needs_gpt2, needs_shakespeare

from llm.commands.main import main

README = "".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/commands.md"))
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
STARTED = [line for line in COMMANDS if line.split()[0] in ("losscurve", "python", "torchrun")]
OURS: dict[str, str] = {}  # by what they do: of equals the first, at its place
for line in STARTED:
    OURS.setdefault(re.sub(r" --out_dir \S+$", "", line), line)
OTHERS = ("make ", "pip ", "git ", "cd ", "python3 -m venv", "source ", ". ")
SMALLER = flags(max_steps=3, warmup_steps=0, eval_every=3, eval_tokens=2000, tokenizer="byte", sample_tokens=9)


def test_every_line_is_known():
    unknown = [line for line in COMMANDS if line not in STARTED and not line.startswith(OTHERS)]
    assert not unknown
    assert len(OURS) > 10


def test_the_makefile_has_every_target_named():
    named = {line.split()[1] for line in COMMANDS if line.startswith("make ")}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert named == {name for name in named if re.search(rf"^{name}:", makefile, re.M)}
    assert {"train", "test"} <= named


@pytest.mark.parametrize(
    ("given", "sampled"),
    [("", ""), ("--seed 2 --out_dir runs/x --max_steps 9", " --out_dir runs/x"), ("--out-dir=x", " --out-dir=x")],
)
def test_make_train_samples_from_the_run_that_it_trained(tmp_path, given, sampled):
    (tmp_path / "ready").touch()  # the environment is there
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    words = ["make", "--silent", "train", f"VENV={tmp_path}", f"BIN={tmp_path}", f"ARGS={given}"]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert shown == [f"-m scripts.train {given}".strip(), f"-m scripts.sample{sampled}"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One folder for the whole README, since later commands use what earlier ones made."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "scripts").symlink_to(ROOT / "scripts")
    (folder / "my.txt").write_text("To be, or not to be, that is the question.\n" * 60, encoding="utf-8")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.md").write_text("# A note\nto be read twice\n" * 60, encoding="utf-8")
    return folder


@needs_gpt2
@needs_shakespeare
@pytest.mark.pictures
@pytest.mark.parametrize("line", OURS.values())
def test_a_command_of_the_readme_runs(home, line, monkeypatch, capsys):
    words = shlex.split(line)
    if "--time" in words:
        words[words.index("--time") + 1] = "9s"
    elif any(word in ("train", "scripts.train", "try") for word in words):
        smaller = "--max_steps 6 --eval_every 3" if "--resume" in words else SMALLER
        typed = {word.partition("=")[0].replace("-", "_") for word in words}
        given = [pair for pair in smaller.split("--")[1:] if f"__{pair.split()[0]}" not in typed]
        words += shlex.split(" ".join(f"--{pair}" for pair in given))
    if "fork" in words:
        words[words.index("--at") + 1] = "0"  # of the run before it, which has 3 steps here
    if "prove-resume" in words:
        words += shlex.split("--max_steps 20 --save_every 4 --n_embd 16 --n_head 2 --sample_tokens 9")
        words[words.index("--kills") + 1] = "1"
    if words[0] == "losscurve" and not {"watch", "--nproc", "--help"} & {*words}:  # PyTorch is imported here already
        monkeypatch.chdir(home)
        monkeypatch.setattr("sys.stdin", io.StringIO("to be\n" * 500))
        code = main(words[1:])
        assert code == 0, capsys.readouterr().err
        return
    module = {"losscurve": ["-m", "llm"], "torchrun": ["-m", "torch.distributed.run"], "python": []}[words[0]]
    words = [sys.executable, *module, *words[1:]]
    if "watch" in words:
        pytest.importorskip("uvicorn")
        check_page(words, home, environment())
        return
    shown = subprocess.run(
        words, cwd=home, env=environment(), capture_output=True, text=True, check=False, input="to be\n" * 500
    )
    assert shown.returncode == 0, shown.stderr
