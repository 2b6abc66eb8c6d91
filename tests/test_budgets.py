"""The predicted loss of `train --time`, held against the runs of benchmarks/budgets.csv and against a real text."""

import pytest
from conftest import words

from benchmarks.budgets import fitted, read_table
from llm.plan import proposal, rule
from llm.plan.request import read_request
from llm.plan.text_facts import look_at
from llm.plan.timing import Pace

ROWS = read_table()


def test_the_figures_of_the_prediction_are_those_that_fit_the_runs():
    assert fitted(ROWS) == pytest.approx(rule.PREDICTION, abs=2e-4)


def test_the_runs_are_on_several_texts_and_end_within_two_deviations():
    assert len({row["text"] for row in ROWS}) >= 3
    assert len({row["asked"] for row in ROWS}) >= 3
    far = []
    for row in ROWS:
        bits, deviation = rule.predicted_bits(row["compressed"], row["flops"], row["train_bytes"])
        if abs(bits - row["bits_per_byte"]) > 2 * deviation:
            far.append((row["text"], row["asked"], bits, row["bits_per_byte"]))
    assert len(far) <= 0.1 * len(ROWS), far


def test_more_work_and_a_simpler_text_promise_fewer_bits():
    bits = [rule.predicted_bits(2.0, flops, 1e6)[0] for flops in (1e12, 1e13, 1e14)]
    assert bits == sorted(bits, reverse=True)
    assert rule.predicted_bits(1.0, 1e13, 1e6)[0] == pytest.approx(bits[1] / 2)


def test_a_text_is_compressed_to_see_what_it_holds(here):
    (here / "same.txt").write_text("a" * 30_000, encoding="utf-8")
    (here / "text.txt").write_text(words(9000), encoding="utf-8")
    same, text = (look_at(read_request("60", {}, {"text": [f"{name}.txt"]}).config) for name in ("same", "text"))
    assert same.compressed < 0.1
    assert 1.0 < text.compressed < 3.0


def test_the_line_about_the_steps_ends_with_it(here, losscurve, monkeypatch):
    (here / "text.txt").write_text(words(9000), encoding="utf-8")
    monkeypatch.setattr(proposal, "short_probe", lambda config: Pace(0.01, 1e-6, 1e-3))
    code, out, err = losscurve("plan --text text.txt --time 60s")
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("steps ")]
    assert "; it should end near " in line
    assert line.endswith(")")
