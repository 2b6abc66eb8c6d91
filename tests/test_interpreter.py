"""Where Python looks for modules: a person's random.py in the working folder is not Python's own."""

import errno
import os
import subprocess
import sys
from types import ModuleType

import pytest
from conftest import ROOT, environment

from llm.checks import prove
from llm.commands import train
from llm.commands.look import runs, watch
from llm.errors import Failure
from llm.machine import interpreter
from llm.prepare.workers import Worker


def test_a_command_takes_no_module_from_the_working_folder(here):
    for name in ("queue", "random", "tempfile", "string", "argparse", "numpy", "tokenizers"):
        (here / f"{name}.py").write_text("raise RuntimeError('not the module you meant')")
    words = "prepare --text text.txt --tokenizer bpe --vocab_size 300"
    command = [sys.executable, "-m", "llm", *words.split()]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (here / "data" / "train.bin").exists()


@pytest.mark.parametrize("door", ["train", "sample", "prepare"])
def test_the_chapters_doors_put_the_working_folder_last(tmp_path, door):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / f"{door}.py").write_bytes((ROOT / "scripts" / f"{door}.py").read_bytes())
    (tmp_path / "argparse.py").write_text("raise RuntimeError('not the module you meant')")
    command = [sys.executable, "-m", f"scripts.{door}", "--help"]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_python_that_is_started_finds_what_this_one_finds(monkeypatch):
    monkeypatch.setattr(sys, "path", ["", "/mine", str(ROOT), "/python/lib"])
    monkeypatch.setenv("PYTHONPATH", "/mine")
    around = interpreter.child_environment()
    assert around["PYTHONPATH"].split(os.pathsep) == ["/mine", str(ROOT), "/python/lib"]
    assert around["PYTHONSAFEPATH"] == "1"
    monkeypatch.setenv("PYTHONPATH", f"/later{os.pathsep}/mine")
    assert interpreter.child_environment()["PYTHONPATH"].split(os.pathsep)[:3] == ["/later", "/mine", str(ROOT)]
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setattr(sys, "path", ["", "/python/lib"])  # the package was found through the working folder
    assert interpreter.child_environment()["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/python/lib"]


def test_every_python_of_ours_is_started_so(monkeypatch, tmp_path):
    around = []

    def start(*_args, env=None, **_options):
        around.append(env)
        raise OSError(errno.ENOMEM, "no more processes")

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(os, "execve", lambda _path, _words, env: around.append(env))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    train.exec_torchrun(2, [])
    with watch.beside(tmp_path):
        pass
    with pytest.raises(OSError, match="no more processes"):
        prove.start([])
    with pytest.raises(Failure, match=r"a tokenizer process cannot be started \(no more processes\)"):
        Worker(tmp_path / "tokenizer.json")
    assert [env["PYTHONSAFEPATH"] for env in around] == ["1"] * 4


def test_a_file_that_stands_in_for_pythons_own_is_named(tmp_path, monkeypatch, losscurve):
    def broken(_argv):
        raise AttributeError("module 'random' has no attribute 'Random'")

    monkeypatch.setattr(runs, "main", broken)
    with pytest.raises(AttributeError):  # nobody's file is to blame: a fault of ours shows itself
        losscurve("runs")
    other = ModuleType("random")
    other.__file__ = str(tmp_path / "random.py")
    monkeypatch.setitem(sys.modules, "random", other)
    with pytest.raises(AttributeError):  # a module of that name, but not one that the path leads to
        losscurve("runs")
    monkeypatch.syspath_prepend(tmp_path)
    assert losscurve("runs") == (
        2,
        "",
        f"error: your {tmp_path}/random.py shadows Python's own module random; rename it, or take its folder off "
        "PYTHONPATH (AttributeError: module 'random' has no attribute 'Random')\n",
    )
