"""`--time` on unusual texts: large, small, of few characters, a folder of other files."""

import dataclasses
import re
import time

import pytest
from conftest import words
from test_autopilot import free_machine, machine  # noqa: F401

from llm.errors import UserError
from llm.plan import arithmetic, autopilot, forecast, proposal, rule, text_size, timing
from llm.plan.request import read_request
from llm.plan.text_size import Text, with_vocabulary
from llm.plan.timing import Pace
from llm.prepare.reuse import ensure
from llm.start.run_folder import once


@pytest.mark.parametrize(
    ("size", "distinct", "given", "expected"),
    [
        (10**6, 5, {}, 512),  # DNA
        (10**9, rule.FEW_CHARACTERS, {}, 512),
        (10**6, rule.FEW_CHARACTERS + 1, {}, 1024),
        (10**6, None, {}, 1024),  # a text that is not on this machine yet
        (1000, 5, {}, None),
        (10**6, 5, {"vocab_size": 2000}, 2000),
    ],
)
def test_a_text_of_few_characters_gets_a_small_vocabulary(size, distinct, given, expected):
    assert rule.tokenizer(size, 1.0, distinct, given).get("vocab_size") == expected


def proposed(text, seconds, measure):
    request = read_request(str(seconds), {}, {"n_layer": 2, "n_embd": 64})
    request = dataclasses.replace(request, config=with_vocabulary(request.config, text.vocabulary))
    return proposal.propose(request, autopilot.with_uncounted(text, seconds), measure)


@pytest.mark.parametrize(("preparation", "uncounted"), [(0.0, 0.0), (15.0, 0.0), (16.0, 1.0), (100.0, 85.0)])
def test_preparing_a_text_uses_at_most_half_of_the_time(preparation, uncounted):
    text = Text(10**7, 4096, preparation=preparation)
    estimated = Text(10**7, 4096, unprepared=int(preparation * timing.TOKENIZING_RATE))
    for each in (text, estimated):
        assert autopilot.with_uncounted(each, 30).uncounted == pytest.approx(uncounted)
    config, longest = (proposed(each, 30, machine()).config for each in (text, Text(10**7, 4096, preparation=15.0)))
    assert config.max_time == 30 + uncounted
    assert config.max_steps > rule.LEAST_STEPS
    assert (config.max_steps > longest.max_steps) == (preparation < 15)
    assert config.max_steps >= longest.max_steps


@pytest.mark.parametrize("preparation", [0.0, 5.0, 40.0])
def test_too_little_time_says_how_much_it_needs_with_the_preparation(preparation):
    text = Text(10**7, 512, preparation=preparation)

    def slow(config, seconds):
        return Pace(0.5, 1e-6, 1e-3)

    with pytest.raises(UserError, match=r"^time = 6 s: too short") as found:
        proposed(text, 6, slow)
    needed = int(re.search(r"--time (\d+)s", str(found.value))[1])
    proposed(text, needed, slow)
    with pytest.raises(UserError):
        proposed(text, 0.8 * needed, slow)


def test_a_long_preparation_is_said_and_lengthens_the_command(here, losscurve, monkeypatch):
    monkeypatch.setattr(proposal, "short_probe", machine(3e9))
    monkeypatch.setattr(rule, "MOST_EPOCHS", 1)
    size = (here / "text.txt").stat().st_size
    monkeypatch.setattr(timing, "TOKENIZING_RATE", size / 38.5)
    code, out, err = losscurve("plan --text text.txt --time 20s")
    assert code == 0, err
    assert "; preparing it takes at least 38.5 s, so the command takes 48.5 s instead of 20 s" in out.splitlines()[0]

    prepare_text, deadlines = autopilot.prepare_text, []
    monkeypatch.setattr(autopilot, "LARGE", 1)
    monkeypatch.setattr(autopilot, "prepare_text", lambda *args: prepare_text(*args) // 60 + 38.5)
    monkeypatch.setattr("llm.train.keep_time", lambda run, _: deadlines.append(run.deadline) or iter(()))
    start = time.perf_counter()
    code, out, err = losscurve("train --text text.txt --time 20s --n_embd 32 --sample_tokens 2")
    assert code == 0, err
    assert "MB of text takes at least 38.5 s, once" in err
    assert "; prepared in 38.5 s, so the command takes 48.5 s instead of 20 s" in out.splitlines()[0]
    # it would be 38.5 s further if the preparation counted twice, and 38.5 s less if it did not count
    assert start + 48.5 - 0.1 < deadlines[0].at < start + 48.5 + 20


def test_a_small_text_is_told_once_what_would_help(here, losscurve, monkeypatch):
    monkeypatch.setattr(proposal, "short_probe", machine(1e10))
    (here / "folder").mkdir()
    (here / "folder" / "a.txt").write_text(words(900), encoding="utf-8")
    code, _, err = losscurve("train --text folder --time 6s --n_embd 32 --sample_tokens 2")
    assert code == 0, err
    assert err.count("bytes to train on are little to learn a language from") == 1
    assert "more text helps most (--text takes several files and folders), then the weights of a run" in err
    assert err.count("folder: reading 1 text") == 1  # though it is opened three times
    monkeypatch.setattr(rule, "SMALL_TEXT", 1000)
    code, _, err = losscurve("plan --text folder --time 6s")
    assert code == 0, err
    assert "little to learn" not in err


def test_a_line_is_said_once():
    said = []
    say = once(said.append)
    for line in ("a", "b", "a"):
        say(line)
    assert said == ["a", "b"]


def test_memory_counts_what_choosing_leaves_in_the_process():
    text = Text(10**6, 1024, preparation=2.0)
    proposal_ = proposed(text, 60, machine())
    bpe = dataclasses.replace(proposal_.config, tokenizer="bpe")
    chosen = autopilot.Choice(None, None, dataclasses.replace(proposal_, config=bpe, measured=3))
    there = dataclasses.replace(chosen.proposal, text=Text(10**6, 1024), measured=1)
    assert chosen.kept_bytes == 2 * arithmetic.MEASURED_SHAPE_BYTES + arithmetic.TRAINED_BPE_BYTES
    assert dataclasses.replace(chosen, proposal=there).kept_bytes == 0

    first, second = (forecast.outline(bpe, 10**6, kept) for kept in (0, 100 * 2**20))
    before, after = (
        int(re.search(r"about ([\d,]+) MiB of memory", line)[1].replace(",", "")) for line in (first, second)
    )
    assert abs(after - before - 100) <= 1


def test_the_time_to_prepare_counts_the_training_of_a_bpe_on_a_bounded_part():
    alone, both = (timing.tokenizing_seconds(50e6, trains) for trains in (False, True))
    assert alone == pytest.approx(50e6 / timing.TOKENIZING_RATE)
    assert both - alone == pytest.approx(50e6 / timing.BPE_TRAINING_RATE)
    larger = [timing.tokenizing_seconds(size, True) for size in (1e9, 2e9)]
    assert larger[1] - larger[0] == pytest.approx(1e9 / timing.TOKENIZING_RATE)
    text = Text(10**7, 2048, unprepared=50_000_000, trains_bpe=True)
    assert timing.preparing_seconds(text) == both


def test_the_tokens_of_a_bpe_are_estimated_from_the_text(here, monkeypatch):
    monkeypatch.setattr(text_size, "BPE_SAMPLE", 2**16)  # of 300,000 characters
    mixed = "".join(words(3000, seed) + "ещё одно слово, и ещё " * 20 for seed in range(12))
    (here / "mixed.txt").write_text(mixed, encoding="utf-8")
    config = read_request("60", {}, {"text": ["mixed.txt"], "tokenizer": "bpe", "vocab_size": 400}).config
    estimated = text_size.text_of(config)
    assert estimated.trains_bpe
    ensure(config)
    counted = text_size.text_of(config)
    assert not counted.trains_bpe
    assert estimated.tokens == pytest.approx(counted.tokens, rel=0.06)
    assert text_size.sampled_bytes_per_token("", 400) == 1.0
