"""Flags as typed: a value is used as it is, nothing that was given is dropped, and every remedy works when pasted."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from conftest import SMALL, flags

import llm
from llm import storage
from llm.commands import train
from llm.commands.check import prove_resume
from llm.commands.flags import Parser, add_settings, flag, typed_settings
from llm.commands.main import COMMANDS, main
from llm.config import ALIASES, FIELDS, from_settings, other_names
from llm.errors import Failure, UserError
from llm.prepare.prepare import prepare


def typed(*words, names=FIELDS, bare=("text",)):
    """Return the settings that these words of a command line give."""
    parser = Parser("losscurve test", "", bare=bare)
    add_settings(parser, names)
    return typed_settings(parser.read(list(words)))


def mistake(*words):
    with pytest.raises(UserError) as caught:
        typed(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def run_wrong(capsys):
    """`run_wrong("sample", "--prompt", "-x")` -> (exit code, the one line on stderr)."""

    def run(*words):
        code = main(list(words))
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1, err
        return code, err

    return run


@pytest.mark.parametrize(
    "value",
    [
        "--Yes, my well-beloved lord",
        "--n-layer x",  # not a flag with its value, but a text that starts like one
        "- a list",
        "-3",
        "-1e-3",
        "-",
        "a=b-c",
        "",
    ],
)
def test_a_value_is_used_as_it_is(value):
    assert typed("--sample_prompt", value, "--seed", "3") == {"sample_prompt": value, "seed": "3"}
    assert typed(f"--sample-prompt={value}") == {"sample_prompt": value}


@pytest.mark.parametrize("value", ["--foo-bar", "-x", "--well-beloved=lord", "--seed", "--n-layer=3 or not", "--it's"])
def test_a_value_that_looks_like_a_flag_gets_a_remedy_that_works(value):
    message = mistake("--sample_prompt", value)
    assert message.startswith("--sample_prompt: no value follows")
    pasted = shlex.split(message.split("starts with a dash as ")[1])
    assert typed(*pasted) == {"sample_prompt": value}


def test_a_sample_continues_what_was_typed(here, losscurve, capsys):
    prepare(("text.txt",), Path("data"), "byte")
    assert losscurve(f"train --data_dir data {flags(max_steps=1, warmup_steps=0, tokenizer='byte')}")[0] == 0
    assert main(["sample", "--prompt", "--Yes, my well-beloved lord", "--max_new_tokens", "0"]) == 0
    assert capsys.readouterr().out == "--Yes, my well-beloved lord\n"


def test_every_command_explains_a_prompt_of_dashes(run_wrong):
    assert run_wrong("sample", "--prompt", "-x") == (
        2,
        "error: --prompt: no value follows; write a value that starts with a dash as --prompt=-x\n",
    )


def test_a_value_that_is_missing():
    assert mistake("--max_steps") == "--max_steps: no value follows; give --max_steps STEPS"
    assert mistake("--text", "--seed", "1").startswith("--text: no value follows")
    assert mistake("--seed", "1", "--text") == "--text: no value follows; give --text PATH"


def test_texts_add_up_in_their_order():
    assert typed("--text", "a", "--text", "b", "c", "--seed", "1", "--text=d")["text"] == ["a", "b", "c", "d"]
    assert typed("a", "--text", "b", "--seed=2", "c", "--", "--d")["text"] == ["a", "b", "c", "--d"]
    assert typed("--text=-x.txt", "-")["text"] == ["-x.txt", "-"]


def test_both_texts_are_trained_on(here, losscurve):
    Path("more.txt").write_text("wxyz " * 200, encoding="utf-8")
    small = flags(max_steps=1, warmup_steps=0)
    assert losscurve(f"train --text text.txt --text more.txt --data_dir data {small}")[0] == 0
    config = tomllib.loads(Path("checkpoints/config.toml").read_text(encoding="utf-8"))
    assert config["text"] == ["text.txt", "more.txt"]
    both = Path("text.txt").stat().st_size + Path("more.txt").stat().st_size
    source = json.loads(Path("data/meta.json").read_text(encoding="utf-8"))["source"]
    assert (source["documents"], source["bytes"]) == (2, both)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--seed 1 --seed 2", "--seed: given twice; give it once"),
        ("--seed 1 --seed=1", "--seed: given twice; give it once"),
        ("--n-layer 1 --n_layer 2", "--n_layer: given twice; give it once"),
        ("--max_iters 5 --max_steps 7", "--max_iters and --max_steps: are the same setting; give one of them"),
        ("--bias --no_bias", "--bias and --no_bias: are the same setting; give one of them"),
    ],
)
def test_a_flag_that_is_given_twice(words, expected):
    assert mistake(*words.split()) == expected


def test_a_setting_that_is_given_twice():
    with pytest.raises(UserError, match="max_steps is given twice, by several of its names; give it once"):
        from_settings({"max_steps": 5, "max_iters": 7})


def test_a_boolean_flag_takes_true_or_false_and_no_text():
    assert typed("--compile", "false") == {"compile": "false"}
    assert typed("--compile", "my.txt", "--bias") == {"compile": True, "text": ["my.txt"], "bias": True}


@pytest.mark.parametrize("command", ["train", "plan", "prepare"])
def test_a_text_needs_no_flag(here, run_wrong, command):
    code, err = run_wrong(command, "missing.txt", "--data_dir=there")
    assert code == 2
    assert "missing.txt" in err


def test_a_word_without_a_flag(run_wrong):
    assert run_wrong("sample", "To be") == (
        2,
        "error: To be: has no flag; write --out_dir 'To be' or --prompt 'To be'\n",
    )
    assert run_wrong("train", "my.toml")[1].startswith("error: my.toml: is a preset; write --preset my.toml; ")
    assert "--preset chapter;" in run_wrong("train", "chapter")[1]
    assert run_wrong("train", "n-layer=6")[1].endswith("write --n-layer=6\n")
    assert run_wrong("doctor", "me") == (2, "error: unknown argument me; see --help\n")
    assert run_wrong("report", "a", "b") == (2, "error: unknown argument b; see --help\n")
    assert "takes no value" in run_wrong("train", "--resume=yes")[1]


def test_a_file_whose_name_starts_with_a_dash(here, run_wrong):
    Path("-x.txt").write_text("abc", encoding="utf-8")
    assert run_wrong("train", "-x.txt") == (
        2,
        "error: unknown argument -x.txt; if you mean the file of that name, write ./-x.txt\n",
    )
    assert flag("out_dir", "-x y") == "--out_dir='-x y'"
    assert flag("out_dir", "x y") == "--out_dir 'x y'"


@pytest.mark.pictures
def test_folders_may_stand_anywhere(here, run_wrong):
    assert "one: " in run_wrong("plot", "--out", "p.png", "one")[1]
    assert "one: " in run_wrong("explain", "--", "one")[1]


@pytest.mark.parametrize("word", ["--version", "version", "-V"])
def test_the_version(word, capsys):
    assert main([word]) == 0
    assert re.fullmatch(r"losscurve \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_the_names_of_other_programs_suggest_ours(run_wrong):
    assert "use --max_steps (a run is measured in steps: max_steps = epochs x" in run_wrong("train", "--epochs", "3")[1]
    assert "; use --max_lr" in run_wrong("train", "--lr=1e-3")[1]
    assert "; use --track (tensorboard or wandb" in run_wrong("train", "--wandb-log=True")[1]
    assert "; use --out_dir" in run_wrong("train", "--out", "x")[1]
    assert run_wrong("report", "--out_dir", "x")[1] == "error: unknown argument --out_dir; use --out\n"
    assert "; use --preset (a name or a TOML file)" in run_wrong("train", "--config", "x.toml")[1]
    assert "; use --init_from" in run_wrong("train", "--model", "gpt2")[1]
    assert "; use --checkpoint" in run_wrong("sample", "--model", "gpt2.pt")[1]
    assert "; use --prompt" in run_wrong("sample", "--start", "x")[1]
    assert "; use --data_dir" in run_wrong("prepare", "--out_dir", "x")[1]
    assert run_wrong("sample", "--lr", "1")[1] == "error: unknown argument --lr; see --help\n"
    assert "did you mean --n_layer?" in run_wrong("train", "-n_layer", "6")[1]


def test_names_of_other_programs_in_settings():
    with pytest.raises(
        UserError, match=r"^unknown setting 'num_train_epochs'; use 'max_steps' \(a run is measured in steps"
    ):
        from_settings({"num_train_epochs": 3})
    with pytest.raises(UserError, match=r"^unknown setting 'wandb_log'; use the flag .* --track .*not a setting"):
        from_settings({"wandb_log": True})


def test_the_table_of_other_names_has_none_of_ours():
    own = set(FIELDS) | set(ALIASES)
    for ours, _, theirs in other_names.NAMES:
        assert set(theirs.split()) & own <= {"text", "out_dir"}, ours
    for name in (
        *("epochs", "num_train_epochs", "lr", "n_epoch", "batch", "per_device_train_batch_size", "max_seq_length"),
        *("context_length", "hidden_size", "num_layers", "warmup", "output_dir", "dataset", "data", "model", "fp16"),
        *("gradient_checkpointing", "bf16", "eval_steps", "save_steps", "logging_steps"),
    ):
        found = other_names.find_our_name(name, FIELDS)
        assert found, name
        assert found[0] in FIELDS


@pytest.mark.parametrize(
    "words",
    [
        ["--sample_prompt=--nproc=2 or so", "--nproc", "2", "--text", "a b"],
        ["a b", "--nproc=2", "--sample-prompt=--nproc=2 or so"],
        ["--nproc", "2", "--sample_prompt=--nproc=2 or so", "--", "a b"],
    ],
)
def test_processes_are_started_with_the_words_that_were_typed(words, monkeypatch):
    started = []
    monkeypatch.setattr(train.os, "execve", lambda path, argv, env: started.append(argv))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    train.main(words)
    behind = started[0][started[0].index("train") + 1 :]
    args = train.parse_flags(behind)
    assert (args.nproc, args.sample_prompt, args.text) == (None, "--nproc=2 or so", ["a b"])


def test_the_runs_of_prove_resume_get_the_words_that_were_typed(here, monkeypatch):
    passed = []
    monkeypatch.setattr("llm.checks.prove.whole_run", lambda words, folder: passed.append(words))
    monkeypatch.setattr("llm.checks.prove.killed_run", lambda *more: iter(()))
    monkeypatch.setattr("llm.checks.prove.fingerprint", lambda folder: {})
    prove_resume.main(["--sample_prompt=--seed", "--text", "-x y", "b", "--no_bias", "--preset", "chapter"])
    args = train.parse_flags(passed[0])
    assert (args.sample_prompt, args.text, args.preset) == ("--seed", ["-x y", "b"], "chapter")
    assert from_settings(typed_settings(args)).model.bias is False


HOME = {  # command lines with a path in a home folder that does not exist, and their error
    "train --text=~/x": "x: there is no such file",
    "train --data_dir=~/x": "/x: no train.bin",
    "train --init_from=~/x --text text.txt": "/x: no such file or folder",
    "train --preset=~/x.toml": "/x.toml: cannot be read",
    "train --resume --out_dir=~/x": "/x: no run",
    "sample --out_dir=~/x": "/x: no run",
    "sample --checkpoint=~/x.pt": "/x.pt: no such file",
    "sample --prompt_file=~/x": "/x: cannot be read",
    "show-batch --step 1 --out_dir=~/x": "/x: no run",
    "explain ~/x": "/x: no run",
    "memorised ~/x": "/x: no run",
    "plot ~/x": "/x: no run",
    "report ~/x": "/x: no run",
    "track ~/x --to tensorboard": "/x: no run",
    "verify ~/x": "/x: ",
    "runs ~/x": "/x: ",
}


@pytest.mark.pictures
@pytest.mark.parametrize("line", HOME)
def test_a_home_folder_is_found(here, monkeypatch, run_wrong, line):
    home = here / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    _, err = run_wrong(*line.split())
    assert HOME[line] in err
    assert str(home / "x") in err
    assert "~" not in err


def test_files_are_written_to_the_home_folder(here, monkeypatch, losscurve):
    monkeypatch.setenv("HOME", str(here / "home"))
    assert losscurve("prepare --text=text.txt --tokenizer char --data_dir=~/tokens")[0] == 0
    code, out, err = losscurve(f"train --data_dir=~/tokens --out_dir=~/run {flags(max_steps=1, warmup_steps=0)}")
    assert code == 0, err
    run = here / "home" / "run"
    assert f"next: losscurve sample --out_dir {run}" in out
    config = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    assert (config["out_dir"], config["data_dir"]) == (str(run), str(here / "home" / "tokens"))
    assert losscurve("plot ~/run --out=~/p.png")[0] == losscurve("schedule --out=~/s.png")[0] == 0
    assert losscurve("report ~/run --data_dir=~/tokens --no_memorised --out=~/r.html")[0] == 0
    assert {path.name for path in (here / "home").iterdir()} == {"tokens", "run", "p.png", "s.png", "r.html"}
    assert not Path("~").exists()


def test_help_says_that_a_word_is_a_text(capsys):
    for command in COMMANDS:
        assert main([command, "--nonsense", "--help"]) == 0
        help_text = " ".join(capsys.readouterr().out.split())
        assert ("A word without a flag is a value of --text." in help_text) == (
            command in ("train", "plan", "schedule", "prepare", "prove-resume", "rehearse", "try")
        )


def test_a_typed_flag_overrides_the_preset(here, losscurve):
    code, out, err = losscurve("schedule --preset shakespeare-char-cpu --max_steps 20")
    assert code == 0
    assert err == (
        "note: warmup_steps = 100 of the preset is ignored: it is not below max_steps = 20; the warm-up is 0 steps "
        "(2 %)\n"
    )
    assert "in all: 20 steps, 0 of them warm-up" in out
    code, _, err = losscurve("schedule --preset shakespeare-char-cpu --max_steps 20 --warmup_steps 20")
    assert code == 2
    assert err == "error: warmup_steps = 20 is not below max_steps = 20; lower it, or raise max_steps\n"


def test_a_run_warns_once_about_ignored_settings_of_its_preset(here, losscurve):
    Path("mine.toml").write_text("max_steps = 2000\nwarmup_steps = 100\n", encoding="utf-8")
    small = " ".join(f"--{name} {value}" for name, value in SMALL.items() if name not in ("warmup_steps", "max_steps"))
    code, _, err = losscurve(f"train text.txt --preset mine.toml --max_steps 2 {small}")
    assert code == 0
    assert err.count("warmup_steps = 100 of the preset is ignored") == 1


def test_the_pasted_remedy_of_a_plan_names_its_file(here, losscurve, capsys, monkeypatch):
    monkeypatch.setattr("llm.plan.timing.fits", lambda config: False)  # so nothing is measured
    losscurve("prepare text.txt --tokenizer char")
    words = shlex.split(f"plan --data_dir data {flags()} --out 'my plan.toml'")
    assert main(words) == 0
    assert capsys.readouterr().out.endswith("losscurve train --preset 'my plan.toml'\n")


@pytest.mark.parametrize("line", ["train --text data/*.txt", "prepare data/*.txt", "plan data/t?xt.txt"])
def test_a_pattern_that_no_shell_expanded(here, run_wrong, line):
    assert run_wrong(*line.split())[1] == (
        f"error: {line.split()[-1]}: is a pattern that matches nothing; give the files, or their folder\n"
    )
    Path("data").mkdir()
    Path("data/text.txt").touch()
    assert run_wrong(*line.split())[1].removeprefix(f"error: {line.split()[-1]}: ") == (
        "is a glob pattern that no shell has expanded (it matches 1); remove its quotes, or give the file names\n"
    )


def test_a_pattern_in_settings_is_named(here):
    with pytest.raises(UserError, match=r"^\*\.txt: is a glob pattern that no shell has expanded \(it matches 1\)"):
        prepare(from_settings({"text": "*.txt"}).text, Path("data"), "byte")
    Path("t[1].txt").write_text("abc " * 100, encoding="utf-8")
    assert prepare(("t[1].txt",), Path("data"), "byte")["source"]["characters"] == 400  # a name like any other


@pytest.mark.parametrize("command", ["plot", "explain", "report", "verify", "runs", "watch", "memorised"])
def test_a_pattern_of_runs_is_named(here, run_wrong, command):
    Path("runs/a").mkdir(parents=True)
    assert "runs/*: is a glob pattern that no shell has expanded (it matches 1)" in run_wrong(command, "runs/*")[1]


def test_the_cache_is_never_in_a_folder_named_tilde(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("LOSSCURVE_CACHE", "~/cache")
    assert storage.cache_folder() == here / "cache"
    monkeypatch.delenv("LOSSCURVE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert storage.cache_folder() == here / ".cache" / "losscurve"
    monkeypatch.setenv("HOME", "")
    with pytest.raises(Failure, match="no home folder is known here; set LOSSCURVE_CACHE to a folder"):
        storage.cache_folder()


def test_python_means_what_the_command_line_means(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "home"))
    Path("mine.toml").write_text("max_steps = 2000\nwarmup_steps = 100\n", encoding="utf-8")
    notices = []
    small = {name: value for name, value in SMALL.items() if name not in ("warmup_steps", "max_steps")}
    llm.fit("text.txt", out_dir="~/run", preset="mine.toml", max_iters=1, say=notices.append, **small)
    assert sum("warmup_steps = 100 of the preset is ignored" in line for line in notices) == 1
    assert llm.Run.open("~/run").path == here / "home" / "run"
    llm.fit(out_dir="~/run", resume=True, max_steps=2, say=notices.append)
    assert not Path("~").exists()
