"""The predicted loss of `--time`: counts of n-grams, the fit to the measured runs, and what is said where."""

import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from conftest import CACHE, needs_shakespeare, words
from test_autopilot import machine

from benchmarks.minutes import fit
from llm.plan import proposal, text_facts
from llm.plan.prediction import loss
from llm.plan.request import read_request
from llm.plan.text_facts import look_at
from llm.text import ngram

PROPERTIES = {"train_bytes": 2e6, "cross_entropy": 2.0, "flops": 1e13, "steps": 1000}


def slow_cross_entropy(train, validated):
    """Count one byte after the other, in dictionaries."""
    followers = defaultdict(Counter)
    for start in range(len(train) - ngram.ORDER):
        gram = train[start : start + ngram.ORDER + 1]
        for order in range(ngram.ORDER + 1):
            followers[gram[:order]][gram[order]] += 1
    bits = []
    for place in range(ngram.ORDER, len(validated)):
        probability = 1 / 256
        for order in range(ngram.ORDER + 1):
            met = followers.get(validated[place - order : place])
            if met:
                total = sum(met.values())
                probability = (met[validated[place]] + len(met) * probability) / (total + len(met))
        bits.append(-math.log2(probability))
    return sum(bits) / len(bits)


@pytest.mark.parametrize(
    "text", [words(900), "ещё раз, ещё много раз " * 40 + words(50), "\0\xff\0\xff" * 99 + "aba" * 50]
)
def test_the_cross_entropy_is_that_of_a_direct_count(text):
    content = text.encode("utf-8")
    train, validated = content[:-300], content[-300:]
    assert ngram.cross_entropy(train, validated) == pytest.approx(slow_cross_entropy(train, validated), rel=1e-9)


def test_noise_has_eight_bits_and_repetition_none():
    noise = np.random.default_rng(0).integers(0, 256, 60_000, np.uint8).tobytes()
    assert 7.9 < ngram.cross_entropy(noise[:50_000], noise[50_000:]) < 9.0  # smoothing trusts rare contexts too much
    assert ngram.cross_entropy(b"abcdefgh" * 5000, b"abcdefgh" * 1000) < 0.01


def test_of_a_long_text_a_bounded_part_from_all_over_it_is_counted(monkeypatch):
    text = bytes(range(256)) * 40
    found = ngram._spread(text, 640)
    assert len(found) == 640
    assert found[:10] == text[:10]
    assert found[-10:] == text[-10:]
    assert ngram._spread(text, len(text)) == text
    monkeypatch.setattr(ngram, "COUNTED", 6400)
    halves = b"ab" * 20_000 + b"xy" * 20_000  # both are met, wherever the counted part lies
    assert ngram.cross_entropy(halves, b"ab" * 500 + b"xy" * 500) < 0.05


def test_a_known_law_is_found_again():
    rows = []
    for text, bits in (("a", 1.5), ("b", 2.0), ("c", 2.5)):
        for flops in (1e12, 3e13, 1e14):
            rows.append(
                {
                    "text": text,
                    "cross_entropy": bits,
                    "flops": flops,
                    "bits_per_byte": bits * 0.7 * (flops / 1e13) ** -0.05,
                }
            )
    assert fit.fitted(rows) == pytest.approx((0.7, -0.05))
    assert max(fit.errors_without(rows, "b")[0]) == pytest.approx(1.0)
    for row in rows[3:6]:
        row["bits_per_byte"] *= 1.2
    ratios, bits = fit.errors_without(rows, "b")
    assert ratios == pytest.approx([1.2] * 3)
    assert min(bits) == pytest.approx(-0.2 * 2.0 * 0.7 * 0.1**-0.05)


def test_the_measured_runs_end_within_what_is_predicted():
    rows, _ = fit.measured()
    assert len(fit.texts_of(rows)) >= 3
    inside = 0
    for row in rows:
        prediction = loss.predict(row)
        if not isinstance(prediction, str):
            inside += prediction.lowest <= row["bits_per_byte"] <= prediction.highest
    assert inside >= 0.9 * len(rows)


@pytest.mark.parametrize(
    ("name", "value", "words_of_it"),
    [
        ("steps", 30, "a run of 30 steps is far from those that were measured (861 to 3,440)"),
        ("flops", 1e18, "a run of 1e+18 FLOPs is far"),
        ("cross_entropy", 0.3, "a text of 0.3 bits per byte by counts is far"),
        (
            "train_bytes",
            5000,
            "a training text of 5,000 bytes is far from those that were measured (1,000,000 to 3,960,000)",
        ),
    ],
)
def test_nothing_is_predicted_far_from_what_was_measured(name, value, words_of_it):
    assert str(loss.predict(PROPERTIES)).endswith(" bits per byte")
    assert words_of_it in loss.predict(PROPERTIES | {name: value})


def test_more_work_and_a_simpler_text_promise_fewer_bits():
    first, more, simpler = (
        loss.predict(PROPERTIES | change) for change in ({}, {"flops": 4e13}, {"cross_entropy": 1.5})
    )
    assert more.lowest < first.lowest < first.highest
    assert simpler.highest == pytest.approx(0.75 * first.highest)


@needs_shakespeare
def test_the_cross_entropy_of_tiny_shakespeare_is_that_of_its_text():
    file = f"{CACHE}/tinyshakespeare/input.txt"
    by_name, by_file = (look_at(read_request("60", {}, {"text": [text]}).config) for text in ("shakespeare", file))
    assert by_file.cross_entropy == pytest.approx(by_name.cross_entropy, abs=1e-3)
    assert by_name.cross_entropy == text_facts.SHAKESPEARE_CROSS_ENTROPY
    other_split = read_request("60", {}, {"text": ["shakespeare"], "val_fraction": 0.3})
    assert look_at(other_split.config).cross_entropy is None


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("", ""),
        ("--tokenizer char", "no prediction: no runs with a given tokenizer were measured"),
        ("--max_lr 0.001 --arch llama", "no prediction: no runs with a given arch, max_lr were measured"),
        (
            "--val_fraction 0.01",
            "no prediction: a validation split of less than 10,000 bytes tells too little of this text",
        ),
        (
            "--text shakespeare --val_fraction 0.3",
            "no prediction: its text has more than 17 million characters, or is given by a name",
        ),
    ],
)
def test_a_plan_says_what_loss_to_expect(here, losscurve, monkeypatch, flags, reason):
    monkeypatch.setattr(proposal, "short_probe", machine())
    monkeypatch.setattr(text_facts, "cross_entropy", lambda train, validated: 1.8)
    monkeypatch.setitem(loss.MEASURED, "train_bytes", (1e4, 1e7))
    (here / "text.txt").write_text(words(120_000), encoding="utf-8")
    code, out, err = losscurve(f"plan --text text.txt --time 60s {flags}")
    assert code == 0, err
    line = out.splitlines()[4]
    if reason:
        assert line == f"loss       {reason}"
        return
    flops = float(re.search(r"; (\S+) FLOP in all", out)[1])
    at_once, power = fit.fitted(fit.measured()[0])  # so the figures in loss.py are those of today's runs.csv
    share = at_once * (flops / 1e13) ** power
    lowest, highest = (float(word) for word in re.fullmatch(r"loss +(\S+) to (\S+) bits per byte at .*", line).groups())
    assert (lowest, highest) == pytest.approx((1.8 * share / 1.112, 1.8 * share * 1.112), abs=0.01)


@pytest.mark.parametrize(
    ("flags", "words_of_it"), [("", "epochs, so weight decay"), ("--dropout 0.3", "epochs, with weight")]
)
def test_a_given_setting_does_not_follow_from_the_epochs(here, losscurve, monkeypatch, flags, words_of_it):
    monkeypatch.setattr(proposal, "short_probe", machine())
    (here / "text.txt").write_text(words(4_000), encoding="utf-8")
    code, out, err = losscurve(f"plan --text text.txt --time 60s {flags}")
    assert code == 0, err
    assert words_of_it in out.splitlines()[3]


def test_a_run_says_at_its_end_what_was_predicted(here, losscurve, monkeypatch):
    monkeypatch.setattr(proposal, "short_probe", machine(1e9))
    monkeypatch.setattr(loss, "predict", lambda properties: loss.Prediction(1.5, 2.5))
    monkeypatch.setattr("llm.train.keep_time", lambda *_: iter(()))
    monkeypatch.setattr(text_facts, "LEAST_VALIDATED", 10)
    code, out, err = losscurve("train --text text.txt --time 7s --sample_tokens 2 --n_embd 32")
    assert code == 0, err
    assert out.splitlines()[4].startswith("loss       1.50 to 2.50 bits per byte at the end")
    (line,) = [line for line in out.splitlines() if line.startswith("predicted 1.50 to")]
    reached = float(line.removeprefix("predicted 1.50 to 2.50 bits per byte, reached "))
    assert 0 < reached < 8
