"""Preparing shards while each operation fails or kills once, the power is cut, or a process really is killed.

The folder then holds the old files or all new ones, and the next preparation ends as an uninterrupted one does.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import words

from llm import storage
from llm.data import open_data
from llm.prepare.prepare import prepare
from llm.tokens.token_files import has_tokens
from tests.faults import checks

TORTURE = bool(os.environ.get("LOSSCURVE_TORTURE"))
MODES = checks.MODES if TORTURE else [("killed", True)]
OLD, NEW = "the old text, of which there is little", "a new text, which is\nlonger"


def scenario(place: Path, resumed: list[int], old: bool) -> checks.Scenario:
    """Prepare NEW in shards, in an empty folder or over OLD."""
    for name, text in (("old", OLD), ("new", NEW)):
        (place / f"{name}.txt").write_text(text)

    def begin(folder: Path) -> None:
        folder.mkdir(parents=True)
        if old:
            prepare((str(place / "old.txt"),), folder, "byte")

    def work(folder: Path, promise: checks.Promise) -> None:
        notices: list[str] = []
        prepare((str(place / "new.txt"),), folder, "byte", shard_tokens=16, overwrite=True, say=notices.append)
        resumed.extend(1 for line in notices if "resuming" in line)
        promise("prepared")

    def judge(folder: Path, promised: list[str]) -> None:
        if not old and not promised and not has_tokens(folder) and not storage.unfinished(folder):
            return
        data = open_data(folder, 4)
        text = bytes(np.concatenate([data.train[:], data.val[:]]).astype(np.uint8)).decode()
        assert text in ([NEW] if promised or not old else [OLD, NEW])
        assert (len(data.hashes) > 2) == (text == NEW)

    def again(folder: Path) -> None:
        work(folder, lambda what: None)
        judge(folder, ["prepared"])
        names = {path.name for path in folder.iterdir()} - {"scanned.json"}  # a copied tree has other times
        assert names == {*expected, ".lock"}, names
        assert {name: (folder / name).read_bytes() for name in expected if name != "meta.json"} == {
            name: content for name, content in expected.items() if name != "meta.json"
        }

    begin(place / "undisturbed")
    prepare((str(place / "new.txt"),), place / "undisturbed", "byte", shard_tokens=16, overwrite=True)
    expected = {path.name: path.read_bytes() for path in (place / "undisturbed").iterdir() if path.name != ".lock"}
    assert len(expected) == 5
    return checks.Scenario("shards over old data" if old else "shards", begin, work, judge, again)


@pytest.mark.parametrize("old", [False, True] if TORTURE else [True])
def test_every_operation_of_preparing_may_fail(tmp_path, old, record_property):
    resumed: list[int] = []
    ends = checks.survives_faults(scenario(tmp_path, resumed, old), tmp_path / "runs", MODES)
    record_property("failed or killed operations", ends.total())
    assert ends["killed"] >= 30
    assert len(resumed) >= 20  # it resumed, and did not only start over


def test_the_power_may_go_while_preparing(tmp_path, record_property):
    trees = checks.survives_power_cuts(scenario(tmp_path, [], True), tmp_path / "runs")
    record_property("trees after a power cut", trees)
    assert trees >= 50


def test_preparing_shards_resumes_after_kills(here, record_property):
    """Send SIGKILL each time that a few more shards are finished."""
    (here / "long.txt").write_text(words(20_000) * 40, encoding="utf-8")
    command = [sys.executable, "-m", "llm", "prepare", "long.txt", "--tokenizer", "byte", "--shard_tokens", "100000"]
    ours = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    kills, done = 0, 0
    while True:
        process = subprocess.Popen(
            [*command, "--data_dir", "d"], env=ours, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        while process.poll() is None and (kills >= 3 or finished("d") < done + 5):
            time.sleep(0.002)
        process.kill()
        err = process.communicate()[1]
        if kills:
            assert f"resuming an interrupted preparation; {done} shards" in err
        if process.returncode == 0:
            break
        assert process.returncode == -9, err
        assert not has_tokens(Path("d"))
        kills, done = kills + 1, finished("d")
    assert kills >= 2
    subprocess.run([*command, "--data_dir", "whole"], env=ours, check=True, capture_output=True)
    names = {path.name for path in Path("whole").iterdir()}
    assert len(names) > 30
    assert names == {path.name for path in Path("d").iterdir()}
    for name in names - {"meta.json"}:
        assert Path("d", name).read_bytes() == Path("whole", name).read_bytes()
    record_property("real kills of preparing", kills)


def finished(folder: str) -> int:
    try:
        return len(json.loads(Path(folder, ".partial.json").read_text())["shards"])
    except FileNotFoundError:
        return 0
