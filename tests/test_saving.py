"""When a checkpoint is due, and that nothing broken is saved."""

import math
import time
from pathlib import Path

import pytest
import torch
from conftest import config_for

from llm.start.new_run import new_run
from llm.storage import checkpoint
from llm.training.events import Saved
from llm.training.refused import NotFinite
from llm.training.saving import save, save_is_due


@pytest.mark.parametrize(
    ("settings", "step", "evaluated", "stale", "due"),
    [
        ({}, 4, True, 1, True),  # as often as eval_every
        ({}, 5, False, 0, False),
        ({"save_every": 3}, 3, False, 1, True),
        ({"save_every": 3}, 4, True, 1, False),
        ({"save_every": 3}, 4, True, 0, True),  # a new best evaluation
    ],
)
def test_when_a_checkpoint_is_due(here, settings, step, evaluated, stale, due):
    with new_run(config_for(here, **settings)) as run:
        run.progress.step = step
        run.progress.stale = stale
        assert save_is_due(run, evaluated) is due


def test_a_time_between_checkpoints(here):
    with new_run(config_for(here, save_every="10m")) as run:
        run.progress.stale = 1
        run.saved_at = time.perf_counter() - 590
        assert not save_is_due(run, evaluated=True)
        run.saved_at -= 20
        assert save_is_due(run, evaluated=False)


def test_a_checkpoint_is_the_state_at_its_step_and_the_weights_beside_it(here):
    with new_run(config_for(here)) as run:
        (event,) = save(run, wait=True)
        run.saver.close()
    assert event == Saved(0, Path("checkpoints/step-000000"))
    groups, facts = checkpoint.load_state(event.folder)
    weights = torch.load("checkpoints/model.pt", weights_only=True)
    assert facts["progress"]["step"] == 0
    assert all(torch.equal(weights[name], value) for name, value in groups["model"].items())


def test_a_tensor_that_is_not_finite_is_not_saved(here):
    with new_run(config_for(here)) as run:
        with torch.no_grad():
            run.parts.model.wpe.weight[0, 0] = math.inf
        with pytest.raises(NotFinite, match=r"wpe\.weight holds a number that is not finite"):
            list(save(run, wait=True))
        run.saver.close()
    assert checkpoint.saved_steps(Path("checkpoints")) == []
