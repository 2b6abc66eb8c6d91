"""What a resume is given is what it uses: the text, the split of a step, folders by any spelling."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import flags

from llm import storage
from llm.config import from_settings, read_toml, to_settings
from llm.errors import UserError
from llm.record.metrics import losses, read_record
from llm.start.resume_run import check_same_settings
from llm.start.run_folder import disk_needed
from llm.storage.checkpoint import saved_steps
from llm.weights import run_config

TEXT = "--text text.txt --data_dir data"


@pytest.fixture
def run(here, losscurve):
    """A small run in checkpoints/, complete at step 4."""
    code, _, err = losscurve(f"train {TEXT} {flags(max_steps=4)}")
    assert code == 0, err
    return here


def test_a_prompt_that_the_tokens_do_not_have_is_refused_before_anything_is_written(run, losscurve):
    before = Path("checkpoints/config.toml").read_bytes()
    code, _, err = losscurve("train --resume --max_steps 8 --sample_prompt ß")
    assert code == 2
    assert err.startswith("error: sample_prompt: character 'ß' (U+00DF) is not in the vocabulary of ")
    assert Path("checkpoints/config.toml").read_bytes() == before


def test_what_a_run_has_written_is_not_asked_of_the_disk_again(run, losscurve, monkeypatch):
    asked = []
    monkeypatch.setattr(storage, "check_writable", lambda folder, needed=0: asked.append(needed))
    files = [*Path("checkpoints").glob("step-*/*"), *Path("checkpoints").glob("*.pt")]
    written = sum(path.stat().st_size for path in files)
    assert losscurve("train --resume --max_steps 6")[0] == 0
    whole = disk_needed(run_config(Path("checkpoints")))
    assert max(asked) == whole - written > 0


def test_what_a_run_was_started_with_may_be_typed_again(here, losscurve):
    typed = "--optimizer muon --muon_lr 0.02 --schedule wsd --decay_fraction 0.5"
    assert losscurve(f"train {TEXT} {typed} {flags(max_steps=4)}")[0] == 0
    code, _, err = losscurve("train --resume --max_steps 6 --muon_lr 0.02 --decay_fraction 0.5")
    assert code == 0, err
    code, _, err = losscurve("train --resume --max_steps 8 --muon_lr x")
    assert (code, err.count("\n")) == (2, 1)


# the same windows split otherwise


def test_a_step_may_be_split_otherwise_on_resume(here, losscurve):
    settings = {"dropout": 0.4, "log_every": 1, "schedule": "constant"}
    assert losscurve(f"train {TEXT} {flags(max_steps=8, out_dir='whole', **settings)}")[0] == 0
    assert losscurve(f"train {TEXT} {flags(max_steps=4, **settings)}")[0] == 0
    again = "train --resume --max_steps 8 --batch_size 2 --gradient_accumulation_steps 2"
    code, out, err = losscurve(again)
    assert code == 0, err
    assert "steps of 4 windows" in out
    assert (
        "batch_size x gradient_accumulation_steps was 4 x 1 and is 2 x 2: the same windows, and losses that may "
        "differ in their last digits"
    ) in err
    whole, parts = (losses(read_record(Path(name)), "train") for name in ("whole", "checkpoints"))
    assert [loss for _, loss in whole] == pytest.approx([loss for _, loss in parts], abs=1e-5)
    assert read_toml("checkpoints/config.toml")["batch_size"] == 2
    assert "complete at step 8" in losscurve("train --resume")[2]  # as it was split last


def test_another_number_of_windows_is_another_run(run, losscurve):
    code, _, err = losscurve("train --resume --max_steps 8 --batch_size 2")
    assert code == 2
    assert (
        "batch_size x gradient_accumulation_steps was 4 x 1 = 4 windows a step in this run and cannot become 2 x 1 = 2 "
        "on --resume; split the same 4 otherwise, with --batch_size 2 --gradient_accumulation_steps 2"
    ) in err
    for given in ("--batch_size 3", "--gradient_accumulation_steps 2"):
        assert "--batch_size 2 --gradient_accumulation_steps 2" in losscurve(f"train --resume {given}")[2]
    code, _, err = losscurve("train --resume --max_steps 8 --batch_size 2 --gradient_accumulation_steps 2")
    assert code == 0, err


def test_the_remedy_for_another_run_works_when_pasted(run, losscurve):
    for given, kept in (("--n_layer 3", False), ("--max_lr 0.001", True)):
        _, _, err = losscurve(f"train --resume {given}")
        command = err.strip().partition("start another run with: losscurve ")[2]
        assert ("--init_from checkpoints" in command) == kept
        code, _, err = losscurve(command)
        assert code == 0, err
        assert saved_steps(Path("checkpoints-2"))
        shutil.rmtree("checkpoints-2")


def test_the_remedy_names_the_folder_that_was_typed_and_other_tokens_have_another_folder(run, losscurve):
    Path("checkpoints").rename("moved")
    for command in ("train --resume --out_dir moved --tokenizer byte", "fork moved --at 0 --tokenizer byte"):
        _, _, err = losscurve(command)
        advised = err.strip().partition("start another run with: losscurve ")[2]
        assert "--preset moved/config.toml" in advised
        code, _, err = losscurve(advised)
        assert code == 0, err
        assert run_config(Path("moved-2")).tokenizer == "byte"
        shutil.rmtree("moved-2")
    assert read_toml("moved/config.toml")["tokenizer"] == "char"


def test_a_checkpoint_from_before_a_setting_existed_has_its_default(run):
    config = run_config(run / "checkpoints")
    settings = json.loads(json.dumps(to_settings(config)))  # as a checkpoint holds them
    del settings["order"]
    check_same_settings(run, config, {"settings": settings})
    with pytest.raises(UserError, match="order is 'epochs', and the checkpoint was trained with 'replacement'"):
        check_same_settings(run, from_settings({"order": "epochs"}, config), {"settings": settings})


# the text


def test_the_same_text_by_any_name_is_the_same_run(run, losscurve, monkeypatch):
    (run / "sub").mkdir()
    shutil.copy("text.txt", "sub/copy.txt")
    for number, text in enumerate(("text.txt", "./text.txt", f"{run}/text.txt", "sub/copy.txt"), 5):
        code, _, err = losscurve(f"train --resume --text {text} --max_steps {number}")
        assert code == 0, err
    assert read_toml("checkpoints/config.toml")["text"] == ("text.txt",)


def test_another_text_is_refused_on_resume(run, losscurve):
    Path("two.txt").write_text("more\n")
    for grown in ("text.txt two.txt", "two.txt"):
        code, _, err = losscurve(f"train --resume --max_steps 8 --text {grown}")
        assert code == 2
    Path("text.txt").write_text(Path("text.txt").read_text() + "abc\n")
    code, out, err = losscurve("train --resume --max_steps 8 --text text.txt")
    assert (code, out) == (2, "")
    assert err.startswith("error: text = text.txt: not the text that data was made from; leave --text out")
    command = err.strip().partition("or train on it with: losscurve ")[2]
    code, _, err = losscurve(command)
    assert code == 0, err
    assert read_toml("checkpoints-2/config.toml")["text"] == ("text.txt",)
    assert losscurve("train --resume --max_steps 8")[0] == 0  # on the tokens that are there


def test_several_texts_are_the_same_only_with_the_same_ends(here, losscurve):
    whole = Path("text.txt").read_text()
    for name, part in (("a", whole[:2000]), ("b", whole[2000:])):
        Path(f"{name}.txt").write_text(part)
    assert losscurve(f"train --text a.txt b.txt --data_dir data {flags(max_steps=2, warmup_steps=0)}")[0] == 0
    assert losscurve("train --resume --text ./a.txt ./b.txt --max_steps 3")[0] == 0
    assert "not the text" in losscurve("train --resume --text b.txt a.txt --max_steps 4")[2]
    assert "not the text" in losscurve("train --resume --text text.txt --max_steps 4")[2]
    for name, part in (("a", whole[:1000]), ("b", whole[1000:])):  # as many, the same joined, cut elsewhere
        Path(f"{name}.txt").write_text(part)
    assert "not the text" in losscurve("train --resume --text a.txt b.txt --max_steps 4")[2]


# settings by another spelling


def test_a_setting_by_another_spelling_is_the_same(run, losscurve):
    small = flags(max_steps=2, warmup_steps=0, out_dir="tuned")
    code, _, err = losscurve(f"train {TEXT} --init_from checkpoints {small}")
    assert code == 0, err
    for number, given in enumerate(("--dtype auto", "--init_from ./checkpoints", f"--init_from {run}/checkpoints"), 3):
        code, _, err = losscurve(f"train --resume --out_dir ./tuned --max_steps {number} {given}")
        assert code == 0, err
    assert losscurve("train --resume --out_dir tuned --max_steps 9 --init_from tuned")[0] == 2


# a run that was moved, or is resumed from elsewhere


def test_a_run_is_resumed_from_elsewhere(here, losscurve, monkeypatch):
    assert losscurve(f"train --text text.txt {flags(max_steps=2, warmup_steps=0, out_dir='runs/a')}")[0] == 0
    Path("sub").mkdir()
    monkeypatch.chdir("sub")
    code, _, err = losscurve("train --resume --out_dir ../runs/a --max_steps 3")
    assert code == 0, err
    assert "they are in ../data/text-char, beside the run" in err
    assert losscurve("train --resume --out_dir ../runs/a --max_steps 4")[0] == 0
    monkeypatch.chdir("/")
    code, _, err = losscurve(f"train --resume --out_dir {here}/runs/a --max_steps 5")
    assert code == 0, err
    monkeypatch.chdir(here)
    code, _, err = losscurve("train --resume --out_dir runs/a --max_steps 6")
    assert (code, err.count("token files")) == (0, 0)


def test_a_run_that_was_moved_with_its_data_finds_it(here, losscurve, monkeypatch):
    Path("old").mkdir()
    shutil.move("text.txt", "old/text.txt")
    monkeypatch.chdir("old")
    assert losscurve(f"train --text text.txt {flags(max_steps=2, warmup_steps=0, out_dir='runs/a')}")[0] == 0
    monkeypatch.chdir(here)
    shutil.move("old", "new")
    moved = "new/data/text-char"
    for command in (
        "show-batch --step 1 --out_dir new/runs/a",
        "memorised new/runs/a --num_samples 1 --max_new_tokens 9",
        "report new/runs/a",
    ):
        code, _, err = losscurve(command)
        assert code == 0, err
        assert f"they are in {moved}, beside the run" in err
    assert f"ok       {moved}/train.bin" in losscurve("verify new/runs/a")[1]
    Path(moved).rename("away")
    resume = "train --resume --out_dir new/runs/a --max_steps 3"
    code, _, err = losscurve(resume)
    where = "data/text-char: the run's token files are not there (seen from here), nor in new/data/text-char"
    assert (code, err) == (2, f"error: {where}; say where by --data_dir\n")
    shutil.copytree("away", "data/text-char")
    Path("data/text-char/meta.json").unlink()
    Path("data/text-char/train.bin").write_bytes(b"\1\0" * 3000)  # another text, where the settings say
    code, _, err = losscurve(resume)
    assert (code, "data/text-char: not the data this run was trained on" in err) == (2, True)
    Path("away").rename(moved)
    code, _, err = losscurve(resume)
    assert (code, f"they are in {moved}" in err) == (0, True)
