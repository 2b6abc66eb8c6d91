"""A training row: the mean of the steps since the row before, refused steps and spikes apart."""

from pathlib import Path

import pytest
import torch
from conftest import config_for

from llm.record.metrics import SPIKE_HISTORY, read_record
from llm.start.new_run import new_run
from llm.training.events import Notice, Step
from llm.training.recording import check_losses, log_step, read_losses
from llm.training.refused import NotFinite


@pytest.fixture
def run(here):
    with new_run(config_for(here)) as run:
        run.restart_pace()
        yield run


def step(number, loss=2.0, refused=False):
    return Step(number, torch.tensor(loss), torch.tensor(0.5), torch.tensor(refused))


def take(run, *steps):
    for one in steps:
        run.take(one)
    read_losses(run)


def test_a_row_is_the_mean_of_its_steps_without_the_refused(run):
    take(run, step(1, 2.0), step(2, float("nan"), refused=True), step(3, 4.0))
    notices = list(log_step(run, step(3)))
    (row,) = read_record(Path("checkpoints"))
    assert (row["step"], row["loss"], row["refused"], row["grad_norm"]) == (3, 3.0, [2], 0.5)
    assert row["tokens"] == 3 * run.parts.config.tokens_per_step
    assert notices == [Notice("no update at step 2: loss or gradient is not a finite number")]
    take(run, step(4, 1.0))
    list(log_step(run, step(4)))
    assert read_record(Path("checkpoints"))[1]["loss"] == 1.0


def test_a_loss_that_leaps_is_marked(run):
    take(run, *(step(number) for number in range(1, SPIKE_HISTORY + 1)), step(SPIKE_HISTORY + 1, 9.0))
    list(log_step(run, step(SPIKE_HISTORY + 1)))
    assert read_record(Path("checkpoints"))[0]["spikes"] == [SPIKE_HISTORY + 1]


def test_skipped_steps_have_no_speed(run):
    run.progress.skipped = [2]
    take(run, step(1), step(2, float("nan"), refused=True))
    list(log_step(run, step(2)))
    assert read_record(Path("checkpoints"))[0]["tokens_per_second"] is None


def test_three_refused_in_a_row_are_not_finite(run):
    bad = {"loss": float("inf"), "refused": True}
    take(run, step(1), step(2, **bad), step(3, **bad))
    check_losses(run)
    take(run, step(4, **bad))
    with pytest.raises(NotFinite) as error:
        check_losses(run)
    assert error.value.batches == [2, 3, 4]
    run.progress.skipped = [4]  # after a rollback
    check_losses(run)
