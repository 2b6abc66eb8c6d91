"""What a run says of itself: each verdict on curves that deserve it and on curves that do not."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import append, flags

from llm import GPT, GPTConfig
from llm.config import TrainConfig
from llm.record import explain, rate_verdicts, time_verdicts, verdicts
from llm.record.explain import News
from llm.schedule import lr_at

CHAPTER = TrainConfig()
# validation at steps, and what the training loss falls to: a run of the chapter's recipe, rounded
STEPS = (0, 250, 500, 1000, 1750, 2500, 5000)
VAL = (10.83, 5.83, 5.18, 4.90, 4.78, 4.81, 5.00)
TRAIN = (10.83, 5.70, 4.85, 4.26, 3.82, 3.55, 3.02)


def record(val, train, config=CHAPTER, end=None, norm=lambda step: 1.0, noise=0.03, beside=0.05):
    """The rows of a run whose losses are functions of the step, the training loss with noise, up to step `end`.
    A step takes a second, and a share `beside` of all time goes to other things."""
    draw, rows = np.random.default_rng(0), []
    for step in range(0, (config.max_steps if end is None else end) + 1, config.log_every):
        shared = {"step": step, "lr": lr_at(step, config), "tokens": step * config.tokens_per_step}
        shared |= {"seconds": step / (1 - beside), "grad_norm": None, "tokens_per_second": None}
        logged = {"grad_norm": norm(step), "tokens_per_second": float(config.tokens_per_step)} if step else {}
        rows.append(shared | {"split": "train", "loss": train(step) + noise * draw.normal()} | logged)
        if step % config.eval_every == 0:
            rows.append(shared | {"split": "val", "loss": val(step)})
    return rows


def chapter(end=None):
    """The chapter's run: losses between its figures as straight lines over the logarithm of the step."""

    def curve(points):
        return lambda step: float(np.interp(math.log(step + 50), np.log(np.array(STEPS) + 50), points))

    return record(curve(VAL), curve(TRAIN), end=end)


def power(start, floor, exponent=0.5, scale=20):
    """A healthy curve: what is left to the floor falls as a power of the step."""
    return lambda step: floor + (start - floor) * (1 + step / scale) ** -exponent


def healthy(config=CHAPTER, **changes):
    curve = power(10.85, 3.0)
    return record(**({"val": curve, "train": curve, "config": config} | changes))


def heads(lines):
    return [line.partition(":")[0] for line in lines]


def test_the_chapters_run_overfits_and_nothing_else_is_alarming():
    assert heads(explain.explain(chapter(), CHAPTER)) == ["overfits since step 1750", "passed ln V / 2 at step 500"]
    line = verdicts.overfits(chapter(), CHAPTER)
    assert "(4.78 to 5.00)" in line
    assert "falls to 3.0" in line
    assert all(cure in line for cure in ("--dropout 0.2", "--weight_decay 0.1", "smaller model", "more text"))
    cured = replace(CHAPTER, weight_decay=0.1, model=replace(CHAPTER.model, dropout=0.2))
    assert "--dropout" not in verdicts.overfits(chapter(), cured)
    assert "--weight_decay" not in verdicts.overfits(chapter(), cured)


def test_a_run_from_other_weights_is_not_told_to_change_their_shape():
    tuned = replace(CHAPTER, init_from="SmolLM2-135M")
    flat = record(lambda step: 4.0, lambda step: 4.0)
    lines = [verdicts.overfits(chapter(), tuned), verdicts.plateau(flat, tuned)]
    assert all(line and "--n_" not in line for line in lines)
    assert "more text" in lines[0]
    assert lines[1].endswith("(a third, three times) or larger weights to start from")


@pytest.mark.parametrize("end", range(0, 5001, 250))
def test_while_it_trains_a_healthy_run_hears_only_of_landmarks(end):
    assert all(head.startswith("passed ") for head in heads(explain.explain(healthy(end=end), CHAPTER)))
    if end <= 1750:
        assert all(head.startswith("passed ") for head in heads(explain.explain(chapter(end), CHAPTER)))


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("exponent", [0.1, 0.3, 1.0])
def test_healthy_runs_of_other_shapes_are_left_alone(shape, exponent):
    config, curve = replace(CHAPTER, schedule=shape), power(10.85, 2.0, exponent)
    lines = explain.explain(record(curve, curve, config), config)
    assert all(head.startswith("passed ") for head in heads(lines)), lines


@pytest.mark.parametrize(("vocab_size", "n_embd", "tied"), [(97, 64, False), (97, 256, True), (2000, 512, False)])
def test_the_first_loss_of_a_fresh_model_is_as_expected(vocab_size, n_embd, tied):
    torch.manual_seed(0)
    shape = GPTConfig(vocab_size=vocab_size, n_embd=n_embd, n_layer=2, block_size=32, tied_lm_head=tied)
    model, config = GPT(shape), TrainConfig(model=shape)
    ids = torch.multinomial(1 / torch.arange(1.0, vocab_size + 1), 4 * 33, replacement=True).view(4, 33)

    def verdict():
        with torch.no_grad():
            loss = float(model(ids[:, :-1], ids[:, 1:])[1])
        return verdicts.first_loss([{"step": 0, "split": "val", "loss": loss}], config)

    assert verdict() is None
    model.lm_head.weight.data.mul_(10)
    assert "check the initialisation" in verdict()


def test_the_first_loss_is_judged_by_width_and_only_of_fresh_weights():
    def verdict(loss, **settings):
        config = TrainConfig(model=GPTConfig(n_embd=settings.pop("n_embd", 128)), **settings)
        return verdicts.first_loss([{"step": 0, "split": "val", "loss": loss}], config)

    assert verdict(10.85) is None
    assert "expected 10.85, from ln 50257 = 10.82" in verdict(11.3)
    assert "cannot know this before training" in verdict(8.0)
    wide = math.log(50257) + 0.0002 * 8192
    assert verdict(wide, n_embd=8192) is None
    assert verdict(math.log(50257), n_embd=8192) is not None
    assert verdict(4.0, init_from="run") is None
    assert verdicts.first_loss([{"step": 0, "split": "val", "loss": None}], CHAPTER) is None
    assert verdicts.first_loss([{"step": 250, "split": "val", "loss": 5.0}], CHAPTER) is None


def test_landmarks_are_passed_one_by_one():
    def verdict(*points):
        return verdicts.landmark([{"step": s, "split": "val", "loss": loss} for s, loss in points], CHAPTER)

    assert verdict((0, 10.7)) is None
    assert verdict((0, 10.9), (250, 10.9)) is None
    assert verdict((0, 10.9), (250, 9.0)).startswith(
        "passed ln V at step 250: validation loss below 10.82 (guessing), lowest 9.00; "
    )
    assert "next is ln V / 2 = 5.41 (token frequencies)" in verdict((250, 9.0))
    last = verdict((250, 9.0), (500, 5.0), (750, 2.6), (1000, 2.9))
    assert last == "passed ln V / 4 at step 750: validation loss below 2.71 (coherent text), lowest 2.60"
    assert "5.41 (token frequencies) passed; ln V / 4 = 2.71 (coherent text) not reached" in verdicts.landmarks(
        4, 50257
    )


def test_a_plateau_is_where_neither_loss_moves():
    def curve(late):
        return lambda step: 4.0 + 6.0 * math.exp(-step / 300) - late * step / 5000

    def verdict(val, train):
        return verdicts.plateau(record(val, train), TrainConfig())

    still, falling = curve(0), curve(0.3)
    assert "stayed at 4.00 and the training loss at 4.00" in verdict(still, still)
    assert verdict(falling, falling) is None
    assert verdict(still, falling) is None  # on its way to overfitting
    assert verdict(falling, still) is None
    flat = record(lambda step: 4.0, lambda step: 4.0)
    assert "try another --max_lr (a third" in verdicts.plateau(flat, TrainConfig())
    assert "try another --max_lr and --muon_lr (a third" in verdicts.plateau(flat, TrainConfig(optimizer="muon"))
    few = [row for row in flat if row["step"] <= 2000]  # 2 evaluations in the last quarter
    assert verdicts.plateau(few, TrainConfig()) is None
    assert verdicts.plateau([], TrainConfig()) is None


def test_spikes_are_named_once_with_their_text():
    rows = healthy()
    assert verdicts.spikes(rows, CHAPTER) is None
    rows[100]["spikes"] = [812]
    line = verdicts.spikes(rows, CHAPTER)
    assert line.startswith("spike: the loss jumped at step 812; ")
    assert "--step 812" in line
    assert "--grad_clip 1" in line
    rows[200]["spikes"] = [1500, 1502]
    assert "jumped at step 812, 3 spikes in all, the last at step 1502" in verdicts.spikes(rows, CHAPTER)
    assert "--grad_clip" not in verdicts.spikes(rows, replace(CHAPTER, grad_clip=1.0))
    rows[200]["spikes"] = 5  # a record from elsewhere
    assert "812" in verdicts.spikes(rows, CHAPTER)


def test_a_loss_that_rises_or_a_gradient_that_explodes_is_too_high_a_rate():
    down = power(10.85, 3.0)

    def rising(step):
        return down(step) + max(0, step - 3000) / 1000

    line = rate_verdicts.diverges(record(rising, rising), CHAPTER)
    assert "the training loss rises again, from 3." in line
    assert "--max_lr 0.0001, --grad_clip 1" in line
    assert rate_verdicts.diverges(record(rising, down), CHAPTER) is None  # that overfits
    assert rate_verdicts.diverges(healthy(), CHAPTER) is None
    assert rate_verdicts.diverges(record(rising, rising, end=300), CHAPTER) is None  # too few rows
    assert rate_verdicts.diverges(healthy(noise=0.5), CHAPTER) is None

    def leap(step):
        return down(step) + (6.0 if step == 4990 else 0)

    assert rate_verdicts.diverges(record(down, leap), CHAPTER) is None  # a spike is not a rise
    exploding = record(down, down, norm=lambda step: 0.5 * math.exp(max(0, step - 3000) / 500))
    assert "the gradient norm grew from 0.5 to " in rate_verdicts.diverges(exploding, CHAPTER)
    assert rate_verdicts.diverges(record(down, down, norm=lambda step: 1 + step / 1000), CHAPTER) is None
    assert rate_verdicts.diverges(record(rising, rising), replace(CHAPTER, max_steps=20000, warmup_steps=6000)) is None


def test_a_loss_that_falls_in_a_straight_line_is_too_low_a_rate():
    learned = np.cumsum([lr_at(step, CHAPTER) for step in range(5001)])

    def verdict(curve, config=CHAPTER, **changes):  # `curve` is a function of the share of the learning done
        rows = record(*[lambda step: curve(float(learned[step] / learned[-1]))] * 2, **changes)
        return rate_verdicts.too_slow(rows, config)

    def straight(share):
        return 10.8 - 4 * share

    line = verdict(straight)
    assert "fell from 10." in line
    assert 44 <= int(re.search(r"(\d+)% of that in the second half", line)[1]) <= 50
    assert "--max_lr 0.0009" in line
    assert verdict(straight, end=2000) is not None
    assert verdict(straight, end=450) is None  # not yet a tenth of the steps
    assert verdict(straight, replace(CHAPTER, init_from="run")) is None
    assert rate_verdicts.too_slow(healthy(), CHAPTER) is None
    assert verdict(lambda share: 10.8 if share < 0.6 else 6.0, noise=0.0) is None  # all at once
    assert verdict(lambda share: 10.8 - 4 * min(1, 5 * share) - 3 * max(0, share - 0.75)) is None  # falls at its end
    assert verdict(lambda share: 10.8) is None
    assert verdict(lambda share: 10.8 - 0.09 * share, noise=0.001) is None  # hardly falls at all
    assert verdict(lambda share: 10.8 + (30 - 39 * share if share > 0.01 else 0)) is None  # back from a divergence


def test_a_leap_near_the_warmup_is_too_short_a_warmup():
    down = power(10.85, 3.0)

    def leaping(at):
        return lambda step: down(step) + 3 * math.exp(-(((step - at) / 20) ** 2))

    line = rate_verdicts.short_warmup(record(down, leaping(130)), CHAPTER)
    assert line.startswith("warm-up of 100 steps probably too short: the training loss jumped from ")
    assert "--warmup_steps 200, --max_lr 0.0001" in line
    assert rate_verdicts.short_warmup(record(down, leaping(2000)), CHAPTER) is None  # long after it
    assert rate_verdicts.short_warmup(record(down, leaping(150), noise=0.8), CHAPTER) is None  # within the noise
    assert rate_verdicts.short_warmup(healthy(), CHAPTER) is None
    bold = replace(CHAPTER, warmup_steps=0)
    assert "--warmup_steps 100, " in rate_verdicts.short_warmup(record(down, leaping(40), bold), bold)
    slow = replace(CHAPTER, warmup_steps=400)
    assert "--warmup_steps" not in rate_verdicts.short_warmup(record(down, leaping(450), slow), slow)
    norms = record(down, down, norm=lambda step: 50.0 if step == 120 else 1.5)
    assert "the gradient norm jumped from 1.5 to 50 by step 120" in rate_verdicts.short_warmup(norms, CHAPTER)
    falling = record(down, down, norm=lambda step: 50.0 if step < 30 else 1.5)
    assert rate_verdicts.short_warmup(falling, CHAPTER) is None


def test_time_outside_the_steps_is_reported_above_a_quarter():
    assert time_verdicts.not_training(healthy(beside=0.2)) is None
    assert time_verdicts.not_training(healthy(beside=0.4)).startswith("time outside the steps: 40% of 8333 s went to ")
    taught = [row | {"seconds": row["seconds"] + 9000} for row in healthy(beside=0.2)]
    assert time_verdicts.not_training(taught) is None  # the teachers' time is neither
    assert time_verdicts.not_training(healthy(beside=0.4, end=500)) is None  # 3 evaluations
    often = replace(CHAPTER, eval_every=10)
    assert time_verdicts.not_training(healthy(often, beside=0.4, end=60)) is not None
    assert time_verdicts.not_training(healthy(often, beside=0.4, end=30)) is None  # less than a minute
    silent = [row | {"tokens_per_second": None} for row in healthy(beside=0.4)]
    assert time_verdicts.not_training(silent) is None  # a record without speeds


def test_slow_data_loading_is_reported_above_a_quarter():
    def waiting(share, **changes):
        """Each step takes a second, of which making its batch takes a share."""
        before, rows = 0, []
        for row in healthy(**changes):
            took = share * (row["step"] - before) if row["tokens_per_second"] else None
            before = row["step"] if took is not None else before
            rows.append(row | {"data_seconds": took})
        return rows

    assert time_verdicts.waits_for_data(waiting(0.2)) is None
    line = time_verdicts.waits_for_data(waiting(0.4))
    assert line.startswith("slow data loading: making batches took 40% of the 5000 s of the steps")
    assert line in explain.explain(waiting(0.4), CHAPTER)
    assert time_verdicts.waits_for_data(waiting(0.4, end=50)) is None  # less than a minute
    assert time_verdicts.waits_for_data(healthy()) is None  # a record of before


def test_an_empty_record_and_one_without_losses_say_nothing():
    assert explain.explain([], CHAPTER) == []
    assert explain.explain([row | {"loss": None, "grad_norm": None} for row in healthy()], CHAPTER) == []


def test_news_says_each_line_once_and_looks_ever_more_rarely(tmp_path, monkeypatch):
    news, said, looks = News(tmp_path, CHAPTER), [], []
    for now in range(0, 5001, 250):
        monkeypatch.setattr(explain, "read_record", lambda path, now=now: chapter(now))
        said += [(now, head) for head in heads(news.at(now))]
    passed = [(250, "passed ln V at step 250"), (500, "passed ln V / 2 at step 500")]
    assert [(step, head) for step, head in said if head.startswith("passed")] == passed
    assert [head for _, head in said if not head.startswith("passed")] == ["overfits since step 1750"]

    monkeypatch.setattr(explain, "read_record", lambda path: looks.append(path) or [])
    looks.clear()
    often = News(tmp_path, CHAPTER)
    for number in range(1, 10_001):
        often.at(10 * number)
    assert 500 < len(looks) < 600  # 100, then one for each 1 %


def test_overfitting_is_reported_once_though_its_step_changes(tmp_path, monkeypatch):
    news, said = News(tmp_path, CHAPTER), []
    for now, line in (
        (1, "overfits since step 220: a"),
        (2, "overfits since step 1,360: b"),
        (3, "passed ln V / 2: c"),
    ):
        monkeypatch.setattr(explain, "explain", lambda *_, line=line: [line])
        monkeypatch.setattr(explain, "read_record", lambda path: [])
        said += news.at(now)
    assert said == ["overfits since step 220: a", "passed ln V / 2: c"]


def test_patience_is_not_advised_to_a_run_that_has_it():
    assert "--patience 3 stops in time; best.pt has the weights of step 1750" in verdicts.overfits(chapter(), CHAPTER)
    assert verdicts.overfits(chapter(), replace(CHAPTER, patience=2)).endswith(
        "more text; best.pt has the weights of step 1750"
    )


def few(*values, start=10.85):
    """A record of as many training rows."""
    shared = {"lr": 1.0, "grad_norm": None, "tokens": 64, "seconds": 1.0, "tokens_per_second": None}
    rows = [shared | {"step": 10 * (i + 1), "split": "train", "loss": value} for i, value in enumerate(values)]
    return [shared | {"step": 0, "split": "val", "loss": start}, *rows]


def test_two_losses_worse_than_guessing_are_reported():
    line = rate_verdicts.diverges(few(64.0, 61.0), CHAPTER)
    assert line.startswith("learning rate probably too high: losses of 62.5 are worse than guessing (10.85)")
    assert "--max_lr 0.0001" in line
    assert rate_verdicts.diverges(few(9.0, None, 2e5, 3e5, 2e5), CHAPTER)  # what was learned at first is no help
    for fine in ((64.0,), (11.2, 11.3), (64.0, 9.0, 8.0), (None, None), ()):
        assert rate_verdicts.diverges(few(*fine), CHAPTER) is None
    assert (
        rate_verdicts.diverges(few(20.0, 21.0, start=25.0), CHAPTER) is None
    )  # begun with other weights, and better now
    overfit = few(3.0, 1.0, 0.2)
    overfit = [row | more for row in overfit[1:] for more in ({}, {"split": "val", "loss": 15.0})]
    assert rate_verdicts.diverges(overfit, CHAPTER) is None
    unread = few(None, 2e5, 3e5)
    assert rate_verdicts.diverges([unread[0], unread[1], *(row | {"split": "val"} for row in unread[2:])], CHAPTER)
    assert rate_verdicts.diverges(few(64.0, 61.0)[1:], CHAPTER)  # without an evaluation ln V is what there is


def test_steps_without_an_update_are_reported():
    rows = few(9.0, None, 8.0)
    assert verdicts.refused(rows, CHAPTER) is None
    rows[2]["refused"] = [15]
    assert verdicts.refused(rows, CHAPTER).startswith(
        "steps without an update: 15, because the loss or the gradient was"
    )
    rows[3]["refused"] = [21, 22]
    assert verdicts.refused(rows, CHAPTER).startswith("steps without an update: 15 to 22, 3 in all, because")
    assert "--step 15 prints the text" in verdicts.refused(rows, CHAPTER)
    assert verdicts.refused(rows, CHAPTER) in explain.explain(rows, CHAPTER)
    assert verdicts.refused([few()[0] | {"refused": "15"}], CHAPTER) is None


def test_a_damaged_record_stops_no_run_and_is_reported_once(tmp_path):
    append(tmp_path, step=0, split="val", loss=1.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write("{\n")
    news = News(tmp_path, CHAPTER)
    assert "line 2 is damaged" in news.at(0)[0]
    assert news.at(10) == []


def test_the_commands_say_it(here, losscurve):
    small = flags(max_steps=60, eval_every=10, log_every=1, max_lr=3e-2)
    code, out, err = losscurve(f"train --text text.txt --data_dir data {small} --explain")
    assert code == 0, err
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert len(notes) == len(set(notes)) >= 1
    assert notes[0].startswith("note: passed ln V at step ")
    assert "passed ln V at" not in out
    code, out, err = losscurve("explain checkpoints")
    assert (code, err) == (0, "")
    assert "passed ln V" in out
    assert losscurve("explain") == (code, out, err)
    Path("checkpoints/metrics.jsonl").write_text('{"step": 0, "split": "train", "loss": 3.0}\n')
    assert losscurve("explain checkpoints")[1] == "nothing to report in the 1 rows of checkpoints\n"
    code, out, err = losscurve("explain nowhere")
    assert (code, out) == (2, "")
    assert "nowhere: no run here" in err
