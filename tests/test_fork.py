"""A fork has its run's past up to a checkpoint, is the same run if nothing changes, and says where it comes from."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import flags, words
from saved_runs import same_bits

from llm.commands.flags import Parser, add_settings, typed_settings
from llm.commands.main import main
from llm.config import FIELDS, read_toml
from llm.errors import UserError
from llm.record.metrics import read_record
from llm.record.plot import draw
from llm.record.runs import origin_of, origins
from llm.start.fork import check_free, usual_folder
from llm.storage import locked, read_json, sha256
from llm.storage.checkpoint import load_state, saved_steps

TIMES = ("seconds", "tokens_per_second", "matmul_utilisation", "data_seconds")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run in base/, which has the states of steps 0, 2, …, 12."""
    home = tmp_path_factory.mktemp("trained")
    (home / "text.txt").write_text(words(900), encoding="utf-8")
    settings = {"dropout": 0.2, "ema": 0.9, "log_every": 5, "keep": 9, "save_every": 2, "schedule": "wsd"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert main(f"train --text text.txt --data_dir data --out_dir base {flags(**settings)}".split()) == 0
    return home


@pytest.fixture
def base(trained, tmp_path, monkeypatch):
    """A copy of the run, in the current folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "base"


def rows_of(run):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read_record(run)]


def files_of(folder):
    return {path: (sha256(path), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_fork_without_a_change_is_the_run_itself(base, losscurve):
    before = files_of(base)
    code, out, err = losscurve("fork base --at 6")
    assert code == 0, err
    assert "base-at-6: forked from base at step 6: nothing changed" in out
    fork = base.with_name("base-at-6")
    for step in (8, 10, 12):
        (ours, facts), (theirs, expected) = (load_state(run / f"step-{step:06}") for run in (fork, base))
        same_bits(ours, theirs)
        for name in ("losses", "recent", "tokens", "best_step", "best_loss", "best_weights", "stale"):
            assert facts["progress"][name] == expected["progress"][name]
    for name in ("model.pt", "best.pt"):
        ours, theirs = (torch.load(run / name) for run in (fork, base))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert rows_of(fork) == rows_of(base)
    for name in ("samples.jsonl", "samples.txt", "tokenizer.json"):
        assert (fork / name).read_bytes() == (base / name).read_bytes()
    assert losscurve("verify base-at-6")[0] == 0
    assert files_of(base) == before


def test_a_fork_goes_its_own_way_from_the_fork_on(base, losscurve):
    """A longer cool-down, from the stable part: the same batches, another learning rate."""
    code, out, err = losscurve("fork base --at 6 --max_steps 20 --min_lr=0 --dropout 0 --out_dir cool --explain")
    assert code == 0, err
    assert "cool: forked from base at step 6: --max_steps=20 --min_lr=0 --dropout=0" in out
    ours, theirs = rows_of(base.with_name("cool")), rows_of(base)
    past = [row for row in theirs if row["step"] <= 6]
    assert ours[: len(past)] == past
    rates = {row["step"]: row["lr"] for row in ours if row["split"] == "train"}
    assert rates[10] == 1e-2  # the cool-down of 40 % begins at step 12
    assert rates[20] == 0
    state = base / "step-000006" / "manifest.json"
    assert read_json(base.with_name("cool") / "env.json")["forked_from"] == {
        "run": "base",
        "step": 6,
        "state": sha256(state),
        "before": {"dropout": 0.2, "max_steps": 12, "min_lr": 1e-3},
    }


def test_what_a_change_rules_out_is_said_to_be_the_runs(base, losscurve):
    settings = read_toml("base/config.toml")
    code, _, err = losscurve(f"fork base --at 10 --max_lr {settings['min_lr'] / 2}")
    assert code == 0, err
    assert f"note: min_lr = {settings['min_lr']} of base is ignored: it is above max_lr" in err
    assert "preset" not in err


@pytest.mark.pictures
def test_where_it_comes_from_is_said_and_stays(base, losscurve):
    assert losscurve("fork base --at 8 --max_lr 0.02 --out_dir hot")[0] == 0
    line = "forked from base at step 8: up to there, the record is that run's"
    assert losscurve("explain hot")[1].startswith(line)
    assert losscurve("report hot --no_memorised")[0] == 0
    html = (base.with_name("hot") / "report.html").read_text()
    assert "<b>forked from base at step 8</b>" in html
    assert str(base.parent) not in html
    assert losscurve("plot hot --out hot.svg")[0] == 0
    assert "forked from base" in base.with_name("hot.svg").read_text()
    curves = [line.get_xdata() for line in draw([base.with_name("hot"), base]).axes[0].lines]
    assert sorted({min(steps) for steps in curves if len(steps) > 2}) == [0, 8]
    env = base.with_name("hot") / "env.json"
    env.write_text(json.dumps(read_json(env) | {"python": "3.0"}))  # as on another machine, where resume writes it anew
    assert losscurve("train --resume --out_dir hot --max_steps 13")[0] == 0
    assert read_json(env)["python"] != "3.0"
    assert origin_of(base.with_name("hot")).step == 8
    assert losscurve("fork hot --at 12 --max_steps 14")[0] == 0  # a fork of a fork
    assert origin_of(base.with_name("hot-at-12-max_steps=14")).run == "hot"
    past = origins(read_json(base.with_name("hot-at-12-max_steps=14") / "env.json"))
    assert [(origin.run, origin.step, origin.before) for origin in past] == [
        ("hot", 12, {"max_steps": 13}),
        ("base", 8, {"max_lr": 0.01}),
    ]


def test_the_best_weights_before_the_fork_come_along_if_they_are_there(base, losscurve):
    state = base / "step-000010" / "state.json"
    facts = read_json(state)
    assert facts["progress"]["best_step"] == 8
    assert losscurve("fork base --at 10 --max_lr 5 --min_lr 5")[0] == 0
    weights = torch.load(base.with_name("base-at-10-max_lr=5,min_lr=5") / "best.pt")
    kept = load_state(base / "step-000008")[0]["ema" if facts["progress"]["best_weights"] == "ema" else "model"]
    assert all(torch.equal(weights[name], value) for name, value in kept.items())
    shutil.rmtree(base / "step-000008")
    code, _, err = losscurve("fork base --at 10 --out_dir late")
    assert code == 0
    assert "base: no longer has the weights of step 8, the best up to step 10" in err


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("--n_layer 3", "n_layer was 2 in this run and cannot become 3 in a fork: the saved weights have this shape"),
        ("--tokenizer byte", "tokenizer was 'char' in this run and cannot become 'byte' in a fork: the saved weights"),
        ("--text other.txt", "error: text was text.txt in this run and cannot become other.txt in a fork: the saved"),
        ("--seed 2", "seed was 1337 in this run and cannot become 2 in a fork: a fork draws the same batches"),
        ("--order epochs", "order was 'replacement' in this run and cannot become 'epochs' in a fork"),
        ("--optimizer muon", "optimizer was 'adamw' in this run and cannot become 'muon' in a fork"),
        ("--ema 0", "ema was 0.9 in this run and cannot become 0.0 in a fork: the checkpoint has an average"),
        ("--dtype float16", "in a fork: float16 scales the loss"),
        ("--max_steps 5", "max_steps = 5: a fork at step 6 has no steps left; give a larger --max_steps, such as 12"),
        ("--at 12", "max_steps = 12: a fork at step 12 has no steps left; give a larger --max_steps, such as 24"),
        ("--max_time 0.001", "base: has used its max_time of 0.001 s; give a larger --max_time"),
        ("--at -1", "base: step -1 has no checkpoint; saved are 0, 2, 4, 6, 8, 10, 12"),
        ("--sample_prompt ß", "sample_prompt: character 'ß' (U+00DF) is not in the vocabulary"),
        ("--data_dir nowhere", "nowhere: the run's token files are not there"),
        ("--out_dir data", "data: holds other files (val.bin); choose another --out_dir"),
        ("--out_dir text.txt", "text.txt: is a file; choose another --out_dir"),
        ("--at 7", "base: step 7 has no checkpoint; saved are 0, 2, 4, 6, 8, 10, 12; give one of them, such as --at 6"),
        ("", "base: no --at given; saved are 0, 2, 4, 6, 8, 10, 12; give one of them"),
        ("--out_dir base", "base: holds a run; continue that with losscurve train --resume --out_dir base"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(base, losscurve, typed, told):
    before = files_of(base.parent)
    at = "" if "--at" in typed or not typed else "--at 6"
    code, _, err = losscurve(f"fork base {at} {typed}")
    assert (code, err.count("\n")) == (2, 1)
    assert told in err
    assert files_of(base.parent) == before


def test_the_command_for_a_folder_that_is_taken_can_be_pasted(tmp_path):
    (tmp_path / "my run").mkdir()
    (tmp_path / "my run" / "config.toml").touch()
    with pytest.raises(UserError, match=r"--resume --out_dir '.*my run', or choose another --out_dir"):
        check_free(tmp_path / "my run")


def test_forks_of_one_state_have_names_that_say_what_changed(base, losscurve, monkeypatch):
    for typed, name in (
        ("--max_lr 2e-2", "base-at-6-max_lr=0.02"),
        ("--max_lr 3e-2 --no_compile", "base-at-6-max_lr=0.03,compile=False"),
        ("--data_dir ../x/data --sample_prompt=../a", "base-at-6-sample_prompt=.._a"),
    ):
        parser = Parser("fork", "")
        add_settings(parser, FIELDS)
        assert usual_folder(Path("base"), 6, typed_settings(parser.read(typed.split()))) == Path(name)
    assert usual_folder(Path("runs/base/"), 6, {}) == Path("runs/base-at-6")
    with pytest.raises(UserError, match="too long for the name of a folder; give a shorter one, with --out_dir"):
        usual_folder(Path("long" * 60), 6, {})
    monkeypatch.chdir(base)
    assert usual_folder(Path(), 6, {}) == base.with_name("base-at-6")
    monkeypatch.chdir(base.parent)
    Path("base-at-6-max_lr=0.02").mkdir()  # an empty folder is taken
    code, out, _ = losscurve("fork base --at 6 --max_lr 2e-2")
    assert code == 0
    assert out.startswith("base-at-6-max_lr=0.02: forked from base at step 6: --max_lr=2e-2")
    assert sorted(path.name for path in Path().glob(".*")) == []
    code, _, err = losscurve("fork base --at 6 --max_lr 2e-2")
    assert code == 2
    assert "base-at-6-max_lr=0.02: holds a run; continue that with losscurve train --resume" in err


def test_a_run_that_trains_can_be_forked(base, losscurve):
    """Its folder is locked, and its record ends in a row that is not complete."""
    with locked(base, "this run folder"), (base / "metrics.jsonl").open("a") as record:
        record.write('{"step": 14, "split": "tr')
        record.flush()
        assert losscurve("fork base --at 6")[0] == 0


def test_with_epochs_a_step_keeps_its_windows(here, losscurve):
    assert losscurve(f"train --text text.txt --out_dir e {flags(order='epochs', keep=9)}")[0] == 0
    code, _, err = losscurve("fork e --at 4 --batch_size 8")
    assert code == 2
    assert "batch_size was 4 in this run and cannot become 8 in a fork: with order = 'epochs'" in err
    code, _, err = losscurve("fork e --at 4 --batch_size 2 --gradient_accumulation_steps 2")  # the same windows
    assert code == 0, err
    assert saved_steps(here / "e-at-4-batch_size=2,gradient_accumulation_steps=2")[-1] == 12


def test_a_damaged_state_is_refused(base, losscurve):
    with (base / "step-000006" / "model.safetensors").open("r+b") as file:
        file.seek(300)
        file.write(b"\xff\xff")
    code, _, err = losscurve("fork base --at 6")
    assert code == 2
    assert "model.safetensors" in err
    assert not base.with_name("base-at-6").exists()
