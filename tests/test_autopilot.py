"""A run for a given time: the rule in closed form with paces that are given, and short real runs."""

import dataclasses
import json
import math
import os
import re
import time
import types
from pathlib import Path

import pytest
from conftest import SMALL, words

import llm
from llm.config import from_settings, read_toml, to_settings
from llm.config.counts import flops_per_token
from llm.errors import UserError
from llm.plan import autopilot, proposal, rule, timing
from llm.plan.proposal import suits
from llm.plan.request import read_request
from llm.plan.steps import parameters_per_token, useful_steps
from llm.plan.text_size import Text, with_vocabulary
from llm.plan.timing import Pace, run_seconds
from llm.prepare.reuse import ensure
from llm.schedule import lr_at, muon_momentum_at
from llm.start.new_run import new_run
from llm.start.resume_run import resume_run
from llm.storage.checkpoint import saved_steps
from llm.train import train
from llm.training import keep_time
from llm.training.events import Notice, Step
from llm.training.live import Deadline

LINES = ("text", "machine", "model", "steps", "loss")


@pytest.fixture(autouse=True)
def free_machine(monkeypatch):
    """No other work: it would keep a short time from being refused."""
    monkeypatch.setattr("llm.plan.timing.seconds_of_others", lambda: 0.0)


def machine(flops_per_second=2e11, growth=1.0):
    """Return the paces of a machine: seconds of a step as FLOPs to the power `growth`."""

    def pace(config, seconds=0.0):
        flops = flops_per_token(config.model) * config.tokens_per_step
        return Pace(1e9 / flops_per_second * (flops / 1e9) ** growth, 1e-6, 1e-3)

    return pace


def proposed(text, seconds, measure=None, preset=None, **typed):
    request = read_request(str(seconds), preset or {}, typed)
    request = dataclasses.replace(request, config=with_vocabulary(request.config, text.vocabulary))
    return proposal.propose(request, text, measure or machine())


# ---- the rule


@pytest.mark.parametrize(
    ("size", "per_character", "given", "expected"),
    [
        (19_999, 1.0, {}, ("byte", None)),
        (20_000, 1.0, {}, ("bpe", 512)),
        (200_000, 1.0, {}, ("bpe", 1024)),
        (5_000_000, 1.0, {}, ("bpe", 2048)),
        (10**9, 1.0, {}, ("bpe", 4096)),
        (10_000, 3.0, {}, ("bpe", 512)),  # a script of many bytes a character: the next row
        (10**9, 3.0, {}, ("bpe", 4096)),
        (10**6, 1.0, {"tokenizer": "char"}, ("char", None)),
        (10_000, 1.0, {"tokenizer": "bpe"}, ("bpe", 512)),
        (10_000, 1.0, {"vocab_size": 300}, ("bpe", 300)),
    ],
)
def test_the_tokenizer_follows_from_the_size_of_the_text(size, per_character, given, expected):
    found = rule.tokenizer(size, per_character, 65, given)
    assert (found["tokenizer"], found.get("vocab_size")) == expected


@pytest.mark.parametrize(
    ("width", "given", "expected"),
    [
        (64, {}, 2),
        (160, {}, 5),
        (224, {}, 2),  # of 112 channels: 3 heads do not divide it
        (256, {}, 4),
        (512, {}, 8),
        (100, {}, 2),  # of 50 channels: 3 heads do not divide it
        (34, {}, 1),
        (192, {}, 3),
        (192, {"n_kv_head": 2}, 2),
        (64, {"n_kv_head": 4}, 4),
    ],
)
def test_heads_divide_the_width(width, given, expected):
    assert rule.heads(width, given) == expected
    assert width % (2 * expected) == 0


def test_every_shape_is_possible_beside_given_heads():
    for given in ({"n_head": 5}, {"n_kv_head": 3}, {"n_layer": 7}, {"n_embd": 90}, {}):
        for row in rule.SHAPES:
            shape = rule.shape(row, given)
            config = from_settings({"arch": "llama"} | shape | given)
            assert {name: getattr(config.model, name) for name in given} == given


def test_a_small_text_gets_short_windows_and_few_of_them():
    assert rule.block_size(60, 10**6) == 128
    assert rule.block_size(300, 10**6) == 256
    assert rule.block_size(300, 20 * 256 - 1) == 128
    assert rule.block_size(300, 100) == 16
    assert rule.windows(128, 10**6) == 16
    tokens = 128 * 16 * rule.USEFUL_STEPS // rule.MOST_EPOCHS
    assert (rule.windows(128, tokens), rule.windows(128, tokens - 1), rule.windows(16, 10)) == (16, 8, 1)


def test_weight_decay_and_dropout_follow_from_passes_and_repetition():
    assert rule.regularisation(6.9, 59, "wsd", False) == {"weight_decay": 0.1, "dropout": 0.0, "decay_fraction": 0.6}
    assert rule.regularisation(7, 59, "wsd", False) == {"weight_decay": 0.3, "dropout": 0.0, "decay_fraction": 0.6}
    assert rule.regularisation(6.9, 60, "wsd", False) == {"weight_decay": 0.1, "dropout": 0.1, "decay_fraction": 0.6}
    assert rule.regularisation(15.9, 1, "wsd", False)["dropout"] == 0.0
    assert rule.regularisation(16, 1, "wsd", False) == {"weight_decay": 0.3, "dropout": 0.1, "decay_fraction": 0.6}
    assert rule.regularisation(10, 200, "cosine", False) == {"weight_decay": 0.3, "dropout": 0.2}
    assert rule.regularisation(30, 1, "cosine", False) == {"weight_decay": 0.3, "dropout": 0.2}
    assert rule.regularisation(30, 200, "cosine", True) == {"weight_decay": 0.3, "dropout": 0.0}


def test_a_teacher_replaces_dropout():
    text = Text(30_000, 512)
    assert proposed(text, 600).config.model.dropout > 0
    assert proposed(text, 600, teacher="runs/first").config.model.dropout == 0


@pytest.mark.parametrize(
    ("tokens", "seconds", "typed", "called"),
    [
        (800_000, 300, {}, False),  # 4 passes
        (400_000, 300, {}, True),
        (400_000, 300, {"dropout": 0.0}, False),
        (400_000, 300, {"teacher": "runs/first"}, False),
        (400_000, 269, {}, False),
    ],
)
def test_a_text_that_is_read_often_calls_for_a_teacher(tokens, seconds, typed, called):
    request = read_request(str(seconds), {}, typed)
    text = Text(tokens, 1024)
    found = proposed(text, seconds, lambda config, seconds: Pace(0.26, 1e-6, 1e-3), **typed)
    choice = autopilot.Choice(request, None, found)
    assert (choice.calls_for_teachers, choice.passes >= 7) == (called, tokens < 800_000)


@pytest.mark.parametrize(
    ("tokens", "seconds", "count"),
    [(400_000, 600, 1), (400_000, 1200, 3), (400_000, 1800, 5), (1_000_000, 1800, 1), (10_000_000, 1800, 0)],
)
def test_a_longer_text_gets_fewer_teachers(tokens, seconds, count):
    """Of a million tokens, each of five teachers would have learned too little in its part of half an hour."""
    found = proposed(Text(tokens, 1024), seconds, lambda config, seconds: Pace(0.45, 1e-6, 1e-3))
    choice = autopilot.Choice(read_request(str(seconds), {}, {}), None, found)
    assert choice.calls_for_teachers == (count > 0)
    if count == 0:
        return
    *teachers, last = choice.timed_runs(overwrite=False)
    assert [run.folder for run in teachers] == last.settings["teacher"]
    assert len(teachers) == count
    assert last.seconds + sum(run.seconds for run in teachers) == pytest.approx(seconds)


@pytest.mark.parametrize(("n_layer", "n_embd", "dropout"), [(6, 192, 0.0), (8, 320, 0.1)])
def test_a_model_that_is_large_for_its_text_gets_dropout_after_fewer_passes(n_layer, n_embd, dropout):
    """Eight passes, of models with 3.3 and 12 parameters in their blocks for each token."""
    text = Text(800_000, 1024)
    shape = {"n_layer": n_layer, "n_embd": n_embd, "batch_size": 12}
    found = proposed(text, 600, lambda config, seconds: Pace(0.27, 1e-6, 1e-3), **shape)
    passes = found.config.max_steps * found.config.tokens_per_step / text.tokens
    assert 7 < passes < 9
    assert found.config.model.dropout == dropout


def test_a_short_time_measures_fewer_shapes():
    assert [rule.probes(seconds) for seconds in (1, 10, 15, 20, 60, 10**6)] == [1, 2, 3, 4, 4, 4]


def test_a_shape_suits_that_gets_enough_steps_and_is_not_too_large_for_the_text():
    pace = Pace(0.05, 1e-7, 1e-5)

    def check(width, seconds, tokens, **more):
        request = read_request(str(seconds), {}, {"n_layer": 4, "n_embd": width} | more)
        return suits(request.config, request, Text(tokens, 1024), pace)

    assert check(64, 60, 10**8)
    assert not check(64, 30, 10**8)  # 570 steps at most
    assert check(512, 100, 19 * 10**5)
    assert not check(512, 100, 18 * 10**5)  # 12.8 M parameters in the blocks
    assert check(512, 100, 11 * 10**5, teacher="runs/first")
    assert not check(512, 100, 10 * 10**5, teacher="runs/first")


# ---- the proposal


@pytest.mark.parametrize("growth", [0.8, 1.0])
def test_more_time_or_more_text_never_gives_a_smaller_model(growth):
    measure = machine(2e10, growth)
    sizes = [
        [flops_per_token(proposed(Text(tokens, 1024), seconds, measure, block_size=128).config.model)
         for seconds in (60, 120, 300, 600, 1800, 3600, 36_000)]
        for tokens in (10**5, 10**6, 10**7, 10**8, 10**9)
    ]  # fmt: skip
    for row in sizes + [list(column) for column in zip(*sizes, strict=True)]:
        assert row == sorted(row)
    assert sizes[0][0] < sizes[-1][-1]


@pytest.mark.parametrize("seconds", [30, 600, 36_000])
@pytest.mark.parametrize("tokens", [3000, 300_000, 10**9])
def test_a_proposal_fills_its_time_and_reads_the_text_a_bounded_number_of_times(seconds, tokens):
    text = Text(tokens, 512, preparation=2.0)
    found = proposed(text, seconds)
    config = found.config
    took = sum(timing.run_seconds(config, text, found.pace).values()) + found.probes * rule.probe_seconds(seconds)
    assert took <= rule.FILL * seconds + 0.5  # a run may save once more
    trained = config.max_steps * config.tokens_per_step
    assert trained <= max(rule.MOST_EPOCHS * tokens, rule.LEAST_STEPS * config.tokens_per_step)
    if config.max_steps < 0.97 * useful_steps(config, read_request(str(seconds), {}, {}), text):
        assert took > (rule.FILL - 0.01) * seconds - 1
    assert found.pace == machine()(config)
    assert config.max_time == seconds
    assert (config.optimizer, config.schedule, config.order, config.model.arch) == ("muon", "wsd", "epochs", "llama")
    assert (config.muon_lr, config.max_lr, config.min_lr) == (rule.MUON_LR, rule.MUON_MAX_LR, 0.0)


@pytest.mark.parametrize(
    ("n_layer", "n_embd", "tokens", "epochs"),
    [(6, 192, 411_268, 14.9), (6, 192, 4_112_680, 40), (2, 64, 411_268, 40), (10, 512, 4_000_000, 11.2)],
)
def test_a_model_that_is_large_for_its_text_gets_fewer_passes(n_layer, n_embd, tokens, epochs):
    """By hand: 2,000 steps of 12 x 256 tokens, or 90 passes x parameters of the blocks for each token; at most 40."""
    shape = {"n_layer": n_layer, "n_embd": n_embd, "n_head": 2, "block_size": 256, "batch_size": 12, "arch": "llama"}
    request = read_request("10h", {}, shape)
    steps = useful_steps(request.config, request, Text(tokens, 1024))
    assert steps * 12 * 256 / tokens == pytest.approx(epochs, rel=0.01)


@pytest.mark.parametrize("seconds", [60, 600, 3600])
def test_evaluations_take_at_most_their_share_of_the_time(seconds):
    text, slow = Text(10**8, 512), Pace(0.05, 2e-5, 2e-3)
    config = proposed(text, seconds, lambda config, seconds: slow, n_layer=4, n_embd=128).config
    parts = timing.run_seconds(config, text, slow)
    spent = parts["evaluation"] + parts["samples"] + parts["pictures"] + parts["saving"]
    assert spent <= rule.EVALUATION_SHARE * seconds + 2 * rule.LEAST_EVAL_TOKENS * slow.evaluated_token


def test_the_best_shape_is_measured_and_no_more_than_the_time_allows():
    seen = []

    def measure(config, seconds=0.0):
        seen.append(config.model)
        return machine()(config)

    found = proposed(Text(10**8, 1024), 600, measure)
    assert len(seen) == len(set(seen)) == found.probes <= rule.MOST_PROBES
    assert dataclasses.replace(found.config.model, dropout=0.0) in seen
    assert proposed(Text(10**8, 1024), 30, machine(1e13)).config.model.n_embd > 64
    for seconds, count in ((9, 1), (14, 2)):
        seen.clear()
        found = proposed(Text(10**8, 1024), seconds, lambda *run: seen.append(run[0].model) or machine(1e13)(*run))
        assert len(seen) == found.measured == count
        assert found.config.model in seen


def test_a_measurement_takes_what_the_plan_counts_for_it():
    took = []
    for seconds, typed in ((60, {"max_time": 900}), (10, {}), (900, {})):
        proposed(Text(10**6, 1024), seconds, lambda *run: took.append(run[1]) or machine()(*run), **typed)
        assert set(took) == {rule.probe_seconds(seconds)}
        took.clear()


def test_the_time_in_which_teachers_predict_is_planned():
    text, request = Text(400_000, 1024), read_request("600", {}, {"teacher": ["planned"], "n_layer": 6, "n_embd": 192})
    config = with_vocabulary(request.config, text.vocabulary)
    teacher = from_settings({"n_layer": 5, "n_embd": 160, "n_head": 5, "block_size": 256}, config).model

    def measure(config, seconds=0.0):
        return dataclasses.replace(machine(3e11)(config), evaluated_token=2e-5)

    found = {}
    for count in (0, 6):
        asked = dataclasses.replace(request, config=config, teachers=count * (teacher,))
        found[count] = proposal.propose(asked, text, measure).config
    pace, ratio = measure(found[0]), flops_per_token(teacher) / flops_per_token(found[0].model)
    seconds = 2 * text.tokens * 6 * 2e-5 * ratio**rule.STEP_GROWTH  # each token is in two windows
    assert (seconds > 50, ratio < 1) == (True, True)
    assert (found[0].max_steps - found[6].max_steps) * pace.step == pytest.approx(seconds, abs=pace.step)
    assert run_seconds(found[6], text, pace, asked.teachers)["teachers"] == pytest.approx(seconds)


def test_dropout_is_measured_because_it_takes_time():
    def measure(config, seconds=0.0):
        pace = machine(1e10)(config)
        return dataclasses.replace(pace, step=pace.step * (2 if config.model.dropout else 1))

    text = Text(30_000, 512)
    found = proposed(text, 600, measure, n_layer=3, n_embd=96)
    assert found.config.model.dropout > 0
    assert found.pace == measure(found.config)
    assert (found.measured, found.probes) == (1, 2)
    passes = found.config.max_steps * found.config.tokens_per_step / text.tokens
    repetition = max(passes * parameters_per_token(found.config, text), 60)
    assert found.config.model.dropout == rule.regularisation(passes, repetition, "wsd", False)["dropout"]


# ---- given settings

GIVEN = [
    {"n_layer": 6},
    {"n_embd": 90},
    {"n_embd": 100, "n_layer": 1},
    {"n_head": 3},
    {"n_kv_head": 2},
    {"ffn_dim": 200},
    {"arch": "gpt2"},
    {"bias": True},
    {"optimizer": "adamw"},
    {"optimizer": "adamw", "arch": "gpt2", "n_embd": 256},
    {"muon_lr": 0.01},
    {"max_lr": 1e-3},
    {"min_lr": 4e-3},
    {"schedule": "cosine"},
    {"decay_fraction": 0.2},
    {"order": "replacement"},
    {"dropout": 0.3},
    {"block_size": 48},
    {"batch_size": 5},
    {"gradient_accumulation_steps": 4},
    {"warmup_steps": 30},
    {"eval_every": 17},
    {"eval_tokens": 500},
    {"ema": 0.99},
    {"max_time": 700.0},
    {"weight_decay": 0.0, "patience": 4, "seed": 5},
]


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: "-".join(given))
def test_given_settings_never_change(given):
    for tokens, seconds in ((2000, 30), (10**6, 600)):
        settings = to_settings(proposed(Text(tokens, 300), seconds, **given).config)
        assert {name: settings[name] for name in given} == given


def test_the_rest_is_chosen_around_the_given_settings():
    text = Text(10**6, 1024)
    assert proposed(text, 600, bias=True).config.model.arch == "gpt2"
    assert proposed(text, 600, n_embd=100).config.model.n_head == 2
    assert proposed(text, 600, n_head=3).config.model.n_embd % 6 == 0
    assert proposed(text, 600, gradient_accumulation_steps=4).config.windows_per_step == 12
    assert proposed(text, 600, optimizer="adamw", n_embd=512).config.max_lr == pytest.approx(7.5e-4)
    assert proposed(text, 600, min_lr=4e-3).config.max_lr == 4e-3
    given_rows = proposed(text, 600, eval_every=1)
    assert sum(timing.run_seconds(given_rows.config, text, given_rows.pace).values()) < 600


@pytest.mark.parametrize("preset", ["shakespeare-char", "shakespeare-char-cpu", "gpt2-124m"])
def test_the_values_of_a_preset_count_as_given(preset):
    said = []
    base = read_toml(preset)
    request = read_request("10h", base, {}, said.append)
    text = Text(10**6, 65)
    request = dataclasses.replace(request, config=with_vocabulary(request.config, text.vocabulary))
    settings = to_settings(proposal.propose(request, text, machine(1e12)).config)
    decided = {"max_steps", "warmup_steps", "eval_every"}
    assert {name: settings[name] for name in base.keys() - decided} == {
        name: base[name] for name in base.keys() - decided
    }
    assert settings["max_steps"] != base["max_steps"]
    assert said == [f"max_steps = {base['max_steps']}, warmup_steps = {base['warmup_steps']}, eval_every = "
                    f"{base['eval_every']} of the preset is ignored: --time decides the steps"]  # fmt: skip


# ---- mistakes


@pytest.mark.parametrize("command", ["plan", "train"])
@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--time soon", "time = 'soon': expected a duration"),
        ("--time 0", "time = '0': expected a duration"),
        ("--time -5", "time = '-5': expected a duration"),
        ("--time 10m --max_steps 50", "max_steps = 50: --time decides the steps; leave one of the two out"),
        ("--time 10m --max_time 5m", "max_time = 300 s: is below time = 600 s; leave --max_time out"),
        ("--time 10m --text -", "write it to a file"),
        ("--time 10m --text tiny.txt", "90 bytes to train on are too few, a run needs 1,000; give more text"),
        ("--time 10m --text nowhere.txt", "nowhere.txt: there is no such file"),
        ("--time 10m --init_from nowhere", "nowhere"),
        ("--time 10m --n_head 3 --n_embd 64", "n_embd = 64 is not divisible by n_head = 3"),
        ("--time 5s --warmup_steps 100000 --text text.txt", "warmup_steps = 100000: only "),
    ],
)
def test_a_mistake_is_one_line(here, losscurve, command, typed, message, monkeypatch):
    monkeypatch.setattr(proposal, "short_probe", machine(1e10))
    (here / "tiny.txt").write_text("0123456789" * 10, encoding="utf-8")
    code, out, err = losscurve(f"{command} {typed}")
    assert (code, out) == (2, "")
    line = err.splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert not (here / "checkpoints").exists()


def test_too_little_time_says_how_much_it_needs(here, losscurve, monkeypatch):
    monkeypatch.setattr(proposal, "short_probe", lambda config, seconds: Pace(1.0, 1e-6, 1e-3))
    code, _, err = losscurve("plan --text text.txt --time 4s")
    assert code == 2
    needed = re.search(r"20 steps of the smallest model here \(2 layers x 64\) need about (\d+) s.*--time (\d+)s", err)
    assert needed[1] == needed[2]
    assert 23 < int(needed[1]) < 40
    assert losscurve(f"plan --text text.txt --time {needed[1]}s")[0] == 0
    assert losscurve(f"plan --text text.txt --time {int(needed[1]) - 5}s")[0] == 2


def test_beside_other_work_the_smallest_model_is_trained_instead(here, losscurve, monkeypatch):
    monkeypatch.setattr(proposal, "short_probe", lambda config, seconds: Pace(1.0, 1e-6, 1e-3, others=77.0))
    code, out, err = losscurve("plan --text text.txt --time 4s")
    assert code == 0, err
    (line,) = err.splitlines()[-1:]
    assert f"other work kept 77.0 of {os.cpu_count()} cores busy" in line
    assert "20 steps are planned, and the run takes more if the machine becomes faster" in line
    assert "llama 2 x 64" in out
    assert "steps      20 of" in out
    code, _, err = losscurve("plan --text text.txt --time 2s")  # not enough to start
    assert code == 2
    assert "time = 2 s: too short" in err
    measure = machine()
    monkeypatch.setattr(proposal, "short_probe", lambda *run: dataclasses.replace(measure(*run), others=os.cpu_count()))
    code, _, err = losscurve("plan --text text.txt --time 60s")
    assert code == 0
    assert err.splitlines()[-1].endswith("the times assume that it continues")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--resume", "--time is for a new run"),
        ("--nproc 2", "--time works with one process"),
    ],
)
def test_time_is_for_a_new_run_of_one_process(here, losscurve, typed, message):
    code, _, err = losscurve(f"train --time 10m {typed}")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_an_existing_run_is_refused_before_any_work(here, losscurve, monkeypatch):
    (here / "checkpoints").mkdir()
    (here / "checkpoints" / "config.toml").touch()
    monkeypatch.setattr(autopilot, "choose_run", None)
    code, _, err = losscurve("train --text text.txt --time 10m")
    assert code == 2
    assert "--overwrite" in err


# ---- the whole


def test_plan_and_train_choose_the_same(here, losscurve, monkeypatch):
    monkeypatch.setattr(proposal, "short_probe", machine(1e9))
    assert losscurve("prepare text.txt --data_dir data/text-byte --tokenizer byte")[0] == 0
    typed = "--text text.txt --time 7s --sample_tokens 2 --n_embd 32"
    code, planned, err = losscurve(f"plan {typed} --out found.toml")
    assert code == 0, err
    monkeypatch.setattr("llm.train.keep_time", lambda *_: iter(()))
    code, out, err = losscurve(f"train {typed}")
    assert code == 0, err
    assert out.splitlines()[:5] == planned.splitlines()[:5]
    found, trained = from_settings(read_toml("found.toml")), from_settings(read_toml("checkpoints/config.toml"))
    changed = {name for name, value in to_settings(trained).items() if to_settings(found).get(name) != value}
    assert changed == {"data_dir", "vocab_size", "dtype", "warmup_steps", "sample_prompt"}  # automatic in a plan


def test_a_plan_is_written_as_train_reads_it(here, losscurve, monkeypatch):
    monkeypatch.setattr(proposal, "short_probe", machine())
    (here / "text.txt").write_text(words(9000), encoding="utf-8")
    code, out, err = losscurve("plan --text text.txt --time 60s --out found.toml")
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()[:5]] == list(LINES)
    assert "bytes to train on, 12 distinct characters: bpe tokens of 512" in out
    assert re.search(r"bpe tokens of 512, about \d+,?\d*00 training tokens", out)
    assert not (here / "data").exists()
    assert read_toml("found.toml")["vocab_size"] == 512
    assert losscurve("plan --text text.txt --time 60s --out found.toml")[0] == 2
    code, out, err = losscurve("train --preset found.toml --max_steps 2 --eval_tokens 100")
    assert code == 0, err
    assert "step     2" in out


def test_plan_counts_in_json(here, losscurve, monkeypatch):
    monkeypatch.setattr(proposal, "short_probe", machine())
    code, out, err = losscurve("plan --text text.txt --time 60s --json")
    assert code == 0, err
    assert sum(json.loads(out)["seconds"].values()) < 60


def test_a_run_ends_in_its_time_and_resumes(here, losscurve):
    start = time.perf_counter()
    code, out, err = losscurve("train --text text.txt --time 8s --out_dir run")
    assert code == 0, err
    assert time.perf_counter() - start < 20  # not a second start, nor an evaluation beyond its time
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == list(LINES)
    assert "estimated" not in lines[0]  # the text was prepared before
    assert lines[5].startswith("validation on all ")
    for said in ("M parameters", "training tokens", "block_size", "cpu (1 thread)"):
        assert out.count(said) == 1, said
    assert lines[-1].startswith("saved run")
    assert (here / "run" / "best.pt").exists()
    assert (here / "run" / "loss_curve.png").exists()
    config = from_settings(read_toml("run/config.toml"))
    assert config.max_time == 8
    assert config.max_steps >= rule.LEAST_STEPS
    ended = saved_steps(here / "run")[-1]
    code, _, err = losscurve("train --out_dir run --resume")
    assert code == 2
    # on a machine that slowed down while it ran, the time may be used up before the last step
    assert ("complete at step" if ended == config.max_steps else "has used its max_time") in err
    code, out, err = losscurve(f"train --out_dir run --resume --max_steps {config.max_steps + 5} --max_time 1h")
    assert code == 0, err
    assert f"step {config.max_steps + 5:5d}" in out


def test_a_late_command_shortens_its_run(here, losscurve, monkeypatch):
    monkeypatch.setattr(proposal, "short_probe", machine(1e9))
    monkeypatch.setattr(keep_time, "seconds_of_step", lambda run: 1.0)
    code, out, err = losscurve("train --text text.txt --time 7s --n_embd 32 --sample_tokens 2 --decay_fraction 0.4")
    assert code == 0, err
    assert "warning: slower than measured: from step " in err
    steps = read_toml("checkpoints/config.toml")["max_steps"]
    assert f"step {steps:5d} | lr 0.00000" in out


def test_weights_keep_their_shape_and_their_tokens(here, losscurve, monkeypatch):
    monkeypatch.setattr(proposal, "short_probe", machine(1e9))
    typed = " ".join(f"--{name} {value}" for name, value in (SMALL | {"n_embd": 32, "block_size": 24}).items())
    assert losscurve(f"train --text text.txt --out_dir base {typed}")[0] == 0
    code, out, err = losscurve("train --text text.txt --init_from base --time 6s --out_dir tuned --sample_tokens 2")
    assert code == 0, err
    config = from_settings(read_toml("tuned/config.toml"))
    assert (config.model.arch, config.model.n_embd, config.model.block_size, config.tokenizer) == (
        "gpt2",
        32,
        24,
        "char",
    )
    assert config.muon_lr == pytest.approx(rule.FINE_TUNING * rule.MUON_LR)
    assert "the weights of base" in out


@pytest.mark.parametrize("tokenizer", ["--tokenizer byte", "--tokenizer bpe --vocab_size 300", ""])
def test_the_files_of_a_text_keep_their_tokens_and_those_of_another_are_refused(
    here, losscurve, monkeypatch, tokenizer
):
    monkeypatch.setattr(proposal, "short_probe", machine())
    assert losscurve(f"prepare text.txt --data_dir mine {tokenizer}")[0] == 0

    def chosen(text):
        request = read_request("60s", {}, {"text": text, "data_dir": "mine", "out_dir": "run"})
        return autopilot.choose_new_run(request, False, print).proposal.config

    assert ensure(chosen("text.txt")) == Path("mine")  # what `train` does next
    (here / "other.txt").write_text("another text " * 900)
    monkeypatch.setattr(proposal, "short_probe", None)  # before anything is measured
    with pytest.raises(UserError, match="mine was made from another text"):
        chosen("other.txt")


def test_token_files_keep_their_tokens(here, losscurve, monkeypatch):
    monkeypatch.setattr(proposal, "short_probe", machine())
    assert losscurve("prepare text.txt --data_dir data --tokenizer char")[0] == 0
    code, out, err = losscurve("plan --time 60s")
    assert code == 0, err
    assert "vocabulary 12, as its token files have them" in out


def test_fit_takes_a_time(here, monkeypatch):
    monkeypatch.setattr(proposal, "short_probe", machine(1e9))
    monkeypatch.setattr(keep_time, "seconds_of_step", lambda run: 1.0)
    said = []
    run = llm.fit("text.txt", time="7s", out_dir="run", n_embd=32, sample_tokens=2, decay_fraction=0.4, say=said.append)
    assert [line.split()[0] for line in said[1].splitlines()] == list(LINES)
    assert run.config.max_time == 7
    assert any(line.startswith("warning: slower than measured") for line in said)
    with pytest.raises(UserError, match="new run"):
        llm.fit("text.txt", time="8s", out_dir="run", resume=True)


# ---- fit the steps to the time


def slow_config(here, **changes):
    settings = {"schedule": "wsd", "max_steps": 100, "eval_every": 10, "warmup_steps": 4, "optimizer": "muon"}
    place = {"text": str(here / "text.txt"), "data_dir": str(here / "data"), "out_dir": str(here / "run")}
    return from_settings(SMALL | settings | place | {"keep": 20} | changes)


def fitting(config, step, left, most=1000):
    return keep_time.fitting_steps(config, step, Deadline(time.perf_counter() + left, most), 0.1)


def test_the_steps_that_fit_keep_the_schedule_so_far(here):
    config = slow_config(here)
    assert fitting(config, 20, 8.05) == 100  # 80 steps in 8 s
    assert fitting(config, 20, 7.7) == 100  # 4 % late
    assert fitting(config, 20, 8.5) == 100  # 6 % early
    assert fitting(config, 20, 5.01) == 70
    assert fitting(config, 50, 1.01) == 83  # 60 would have begun to cool down at 36
    assert fitting(config, 50, -1.0) == 83
    assert fitting(slow_config(here, max_steps=1000), 597, 2.0) == 1000  # 995 is the fewest, and as late
    assert fitting(config, 20, 20.01) == 20 + 194
    assert fitting(config, 20, 20.01, most=150) == 150
    assert fitting(config, 20, 20.01, most=90) == 100
    assert fitting(slow_config(here, schedule="constant"), 80, 1.01) == 90  # no cool-down is in the way
    warm = keep_time.warmed_up(config)
    assert warm == 10  # of the momentum
    for step in range(warm, 61):
        for left in (-1.0, 0.5, 2.0, 4.0, 9.0, 50.0):
            after = dataclasses.replace(config, max_steps=fitting(config, step, left))
            assert step < after.max_steps
            for before in range(max(warm, keep_time.warmed_up(after)), step + 1):
                assert lr_at(before, after) == lr_at(before, config)
                assert muon_momentum_at(before, after) == muon_momentum_at(before, config)


def final_weights(run_dir):
    import torch

    return torch.load(run_dir / "model.pt")


@pytest.mark.parametrize(
    ("every", "end", "at", "steps", "pace"),
    [(10, 65, 10, 65, "slower"), (70, 220, 60, 215, "faster")],  # no checkpoint before the cool-down at step 60
)
def test_a_run_is_fitted_to_its_time_and_its_resume_repeats_it(here, monkeypatch, every, end, at, steps, pace):
    import torch

    config = slow_config(here, eval_every=every)
    with new_run(config) as run:
        clock = types.SimpleNamespace(perf_counter=lambda: float(run.progress.step))  # a step takes a second
        monkeypatch.setattr(keep_time, "time", clock)
        monkeypatch.setattr(keep_time, "seconds_of_step", lambda run: 1.0)
        run.deadline = Deadline(end, 1000)
        notices = [event.text for event in train(run) if isinstance(event, Notice)]
    assert run.progress.step == steps
    assert run.reason == "done"
    assert len(notices) == 1
    assert f"{pace} than measured: from step {at} on, max_steps is {steps} and no longer 100" in notices[0]
    assert read_toml(str(here / "run" / "config.toml"))["max_steps"] == steps
    rows = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
    fitted = [(row["step"], row["split"], row["max_steps"]) for row in rows if "max_steps" in row]
    assert fitted == [(at, "train", steps)]
    assert rows[-1]["lr"] == pytest.approx(lr_at(steps, dataclasses.replace(config, max_steps=steps)))

    finished = final_weights(here / "run")
    for state in (here / "run").glob("step-*"):  # as if it had been killed just after its steps were changed
        if state.name not in ("step-000000", f"step-{at:06d}"):
            for file in state.iterdir():
                file.unlink()
            state.rmdir()
    with resume_run(here / "run", {}) as again:
        assert (again.progress.step, again.parts.config.max_steps) == (at, steps)
        list(train(again))
    repeated = final_weights(here / "run")
    assert all(torch.equal(finished[name], repeated[name]) for name in finished)


def test_a_run_that_is_late_in_its_cool_down_ends_where_it_is(here, monkeypatch):
    with new_run(slow_config(here)) as run:
        monkeypatch.setattr(keep_time, "fitting_steps", lambda config, *rest: config.max_steps)
        run.deadline = Deadline(math.inf, 1000, latest=math.inf)
        for event in train(run):
            if isinstance(event, Step) and event.step == 84:
                run.deadline = Deadline(math.inf, 1000, latest=time.perf_counter())
    assert (run.progress.step, run.reason) == (84, "max_time")
    assert (here / "run" / "step-000084").is_dir()


def test_a_late_run_ends_five_percent_after_its_time_or_where_max_time_says(here):
    for more, latest in (({}, 63.0), ({"max_time": 90}, 90.0)):
        request = read_request("60", {}, {"text": [str(here / "text.txt")], **more})
        choice = autopilot.choose_new_run(request, False, print, measure=machine())
        assert choice.deadline(0.0).latest == pytest.approx(latest)


@pytest.mark.parametrize("changes", [{"schedule": "cosine"}, {"decay_fraction": 1.0}])
def test_a_run_without_a_stable_part_is_never_shortened(here, monkeypatch, changes):
    monkeypatch.setattr(keep_time, "seconds_of_step", lambda run: 1.0)
    with new_run(slow_config(here, max_steps=20, **changes)) as run:
        run.deadline = Deadline(time.perf_counter() + 1, 1000)
        list(train(run))
    assert run.progress.step == 20


@pytest.mark.parametrize(
    ("step", "complaints"),
    [(10, ["config.toml could not be written, so the steps of the run stay as they are"]), (3, [])],
)
def test_a_full_disk_or_an_old_checkpoint_leaves_the_run_as_it_is(here, monkeypatch, step, complaints):
    monkeypatch.setattr(keep_time, "seconds_of_step", lambda run: 1.0)

    def full(path, text):
        raise OSError(28, "No space left on device")

    with new_run(slow_config(here, max_steps=30)) as run:
        run.deadline = Deadline(time.perf_counter() + 1, 1000)
        monkeypatch.setattr(keep_time, "saved", lambda run, wait: iter(()))
        monkeypatch.setattr(keep_time.checkpoint, "saved_steps", lambda out_dir: [step])
        monkeypatch.setattr(keep_time.storage, "write_text", full)
        run.progress.step = step
        notices = [event.text for event in keep_time.keep_time(run, True)]
        assert run.parts.config.max_steps == 30
    assert [line.partition(" (")[0] for line in notices] == complaints


def test_a_step_counts_its_share_of_the_evaluations(here):
    with new_run(slow_config(here)) as run:
        run.progress.step, run.progress.bookkeeping = 20, 9.0
        run._began = time.perf_counter() - 29.0
        # 20 steps in 20 s; evaluations at 0, 10 and 20 took 9 s, 3 s for each 10 steps
        assert keep_time.seconds_of_step(run) == pytest.approx(1.3, rel=0.05)
