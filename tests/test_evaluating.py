"""What an evaluation records, writes and notes, one part at a time."""

import math
import time
from pathlib import Path

import pytest
import torch
from conftest import config_for

from llm.evaluate import Evaluation, evaluate
from llm.record.metrics import read_record
from llm.record.samples import read_samples
from llm.start.new_run import new_run
from llm.training.evaluating import draw_sample, evaluate_run, first_loss, note_evaluation, show_at_end
from llm.training.events import Line, Notice

pytestmark = pytest.mark.pictures


@pytest.fixture
def run(here):
    with new_run(config_for(here, sample_prompt="ab")) as run:
        yield run


def found(loss):
    return Evaluation(loss, None, 10)


def test_the_first_line_is_the_untrained_model(run):
    (line,) = (event for event in evaluate_run(run) if isinstance(event, Line))
    expected = evaluate(run.parts.model, run.parts.data.val, 16, 10**6)
    assert line.evaluation.loss == expected.loss
    assert line.train_loss == first_loss(run.parts)
    assert [(row["split"], row["loss"]) for row in read_record(Path("checkpoints"))] == [
        ("train", line.train_loss),
        ("val", expected.loss),
    ]
    (sample,) = read_samples(Path("checkpoints"))
    assert (sample.step, sample.prompt + sample.text) == (0, line.sample)
    assert not Path("checkpoints/loss_curve.png").exists()  # a curve needs a step


def test_the_first_loss_is_that_of_the_model_itself(run):
    """A compiled forward pass would be compiled once more, for one that makes no gradients."""
    expected = first_loss(run.parts)
    run.parts.forward = lambda *_: pytest.fail("compiled again")
    assert first_loss(run.parts) == expected


def test_the_training_loss_of_a_line_is_the_mean_since_the_line_before(run):
    run.progress.step = 4
    run.progress.interval_loss = 6.0
    run.progress.interval_steps = 4
    (line,) = (event for event in evaluate_run(run) if isinstance(event, Line))
    assert line.train_loss == 1.5
    assert (run.progress.interval_loss, run.progress.interval_steps) == (0.0, 0)
    assert Path("checkpoints/loss_curve.png").exists()


def test_the_best_evaluation_is_the_first_of_equals(run):
    progress = run.progress
    seen = []
    for step, loss in enumerate([3.0, 2.0, 2.0, math.nan, 2.5, 1.0]):
        progress.step = step
        note_evaluation(run, found(loss))
        seen.append((progress.best_step, progress.best_loss, progress.stale))
    assert seen == [(0, 3.0, 0), (1, 2.0, 0), (1, 2.0, 1), (1, 2.0, 2), (1, 2.0, 3), (5, 1.0, 0)]
    assert progress.last_loss == 1.0


def test_a_sample_is_the_same_draw_at_every_evaluation_and_leaves_the_model_in_training(run):
    first = draw_sample(run.parts, "ab")
    torch.manual_seed(99)
    assert draw_sample(run.parts, "ab") == first
    assert len(first) == run.parts.config.sample_tokens
    assert run.parts.model.training


def test_a_picture_that_cannot_be_written_is_one_notice_until_it_can(run, monkeypatch):
    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    run.progress.step = 4
    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", fails)
        notices = [e.text for _ in range(3) for e in evaluate_run(run) if isinstance(e, Notice)]
    assert len(notices) == 1
    cause = f"{run.out_dir}/loss_curve.png: cannot be written (No space left on device)"
    assert f"({cause}); training goes on" in notices[0]  # without a remedy, which would be that of the command plot
    assert not [event for event in evaluate_run(run) if isinstance(event, Notice)]
    run.drawing_seconds = 0.0  # or the next picture would come later
    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", fails)
        assert len([event for event in evaluate_run(run) if isinstance(event, Notice)]) == 1  # it failed again


def test_pictures_take_a_fiftieth_of_a_run_and_the_last_is_drawn_at_its_end(run, monkeypatch):
    drawn = []
    monkeypatch.setattr("llm.training.evaluating.plot_runs", lambda *_: drawn.append(run.progress.step))
    for step, ago in ((1, 0), (2, 5), (3, 10.1), (4, 5)):
        run.progress.step = step
        run.drawn_at = time.perf_counter() - ago
        list(evaluate_run(run))
        run.drawing_seconds = 0.2
    assert drawn == [1, 3]
    assert not list(show_at_end(run))
    assert drawn == [1, 3, 4]
    assert not list(show_at_end(run))
    assert drawn == [1, 3, 4]
