"""Numbers that are not finite: no update, a rollback where they go on, and what is said of them."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import config_for, steps_in, trained

from llm import storage
from llm.checks.prove import fingerprint
from llm.errors import Failure
from llm.record.metrics import read_record
from llm.record.samples import read_samples
from llm.start.new_run import new_run
from llm.start.resume_run import resume_run
from llm.storage.checkpoint import newest_state
from llm.train import train
from llm.training.events import Notice, Step
from llm.training.refused import where_it_breaks


def plant(run, value, steps, where="loss", scale=1.0):
    """Make the loss or the gradient of the batches of `steps` `value`, every time they are tried."""
    plain, spoiled = run.parts.forward, set()
    for step in steps:
        for micro in run.parts.micro_batches(step - 1):
            spoiled.add(micro.x.numpy().tobytes())

    def forward(x, y, seeds=None, taught=None):
        loss = plain(x, y, seeds)[1]
        if x.numpy().tobytes() in spoiled and torch.is_grad_enabled():
            if where == "loss":
                return None, loss * value
            loss.register_hook(lambda grad: grad * value)
        return None, loss

    run.parts.forward = forward


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_makes_no_update(here, where, value):
    with new_run(config_for(here, max_steps=8, log_every=1)) as run:
        plant(run, value, [3, 6], where)
        before = []
        events = []
        for event in train(run):
            events.append(event)
            if isinstance(event, Step):
                before.append([p.detach().clone() for p in run.parts.model.parameters()])
    same = [all(torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(before)]
    assert same == [False, True, False, False, True, False, False]
    said = [event.text for event in events if isinstance(event, Notice)]
    assert said == [f"no update at step {n}: loss or gradient is not a finite number" for n in (3, 6)]
    rows = [row for row in read_record(Path("checkpoints")) if row["split"] == "train"]
    assert [row["step"] for row in rows if "refused" in row] == [3, 6]
    assert [row["loss"] is None for row in rows] == [row["step"] in (3, 6) for row in rows]
    assert run.progress.refused == [3, 6]
    facts = storage.read_json(Path("checkpoints/step-000008/state.json"))
    assert facts["progress"]["refused"] == [3, 6]
    optimizer_step = next(iter(run.parts.optimizer.state.values()))["step"]
    assert optimizer_step.item() == 6


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_replay_refuses_the_same_batches(here, optimizer):
    """Stopped between two refused batches, or before a run goes back, and resumed: as if never stopped."""
    for folder, stop_at in (("whole", None), ("first", 4), ("second", 8)):
        with new_run(config_for(here, out_dir=folder, max_steps=16, log_every=2, optimizer=optimizer)) as run:
            plant(run, math.nan, [3, 6, 9, 10, 11, 12])
            run.stop = lambda run=run, stop_at=stop_at: run.progress.step == stop_at
            list(train(run))
        if stop_at:
            with resume_run(Path(folder), {}) as run:
                assert run.progress.refused == ([3] if stop_at == 4 else [3, 6])
                plant(run, math.nan, [3, 6, 9, 10, 11, 12])
                list(train(run))
        assert run.progress.rollbacks == 1
        assert fingerprint(Path(folder)) == fingerprint(Path("whole"))


def test_several_refused_in_a_row_are_passed_over_from_the_last_checkpoint(here):
    with new_run(config_for(here, max_steps=12, log_every=1)) as run:
        plant(run, math.nan, [6, 7, 8])
        events = list(train(run))
    said = [event.text for event in events if isinstance(event, Notice) and "going on" in event.text]
    assert said == [
        "step 6: loss or gradient is not a finite number; going on from the checkpoint of step 4, "
        "without the batches of steps 6 to 8"
    ]
    assert run.reason == "done"
    assert run.progress.skipped == run.progress.refused == [6, 7, 8]
    assert [e.step for e in steps_in(events)] == [*range(1, 9), *range(5, 13)]
    steps = [row["step"] for row in read_record(Path("checkpoints")) if row["split"] == "train"]
    assert steps == list(range(13))
    timed = [
        row["step"]
        for row in read_record(Path("checkpoints"))
        if row["matmul_utilisation"] and row["tokens_per_second"]
    ]
    assert timed == [1, 2, 3, 4, 5, 9, 10, 11, 12]  # steps that were passed over took no time
    assert next(iter(run.parts.optimizer.state.values()))["step"].item() == 9


def test_a_run_that_only_gives_nonsense_stops_and_tells_the_batch(here):
    with new_run(config_for(here, max_steps=40, log_every=1, gradient_accumulation_steps=3)) as run:
        plant(run, math.nan, range(6, 41))
        with pytest.raises(Failure, match=r"step 15: .*going back 3 times did not help; .*refused\.json"):
            list(train(run))
    facts = storage.read_json(Path("checkpoints/refused.json"))
    assert facts["step"] == 15
    assert len(facts["windows"]) == 4  # those of a micro-batch
    assert all(window in Path("text.txt").read_text() for window in facts["windows"])
    found, _, _ = newest_state(Path("checkpoints"))
    assert all(torch.isfinite(p).all() for p in found["model"].values())


@pytest.mark.parametrize("name", ["h.0.mlp.c_fc.weight", "wpe.weight"])
def test_a_spoiled_weight_is_never_saved(here, name):
    """What spoils the memory of a run is undone by its last checkpoint: it ends as if nothing had been."""
    trained(config_for(here, out_dir="whole"))
    with new_run(config_for(here, out_dir="spoiled")) as run:
        for event in train(run):
            if isinstance(event, Step) and event.step == 6 and run.progress.rollbacks == 0:
                with torch.no_grad():
                    run.parts.model.get_parameter(name)[0, 0] = math.nan
    assert run.reason == "done"
    assert run.progress.rollbacks == 1
    weights = [torch.load(f"{folder}/model.pt", weights_only=True) for folder in ("whole", "spoiled")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_weight_that_no_batch_uses_is_looked_at_before_a_save(here):
    trained(config_for(here, out_dir="whole", vocab_size=200))
    with new_run(config_for(here, out_dir="spoiled", vocab_size=200)) as run:
        for event in train(run):
            if isinstance(event, Step) and event.step == 6 and run.progress.rollbacks == 0:
                with torch.no_grad():
                    run.parts.model.wte.weight[199] = math.nan
    assert run.progress.rollbacks == 1
    assert run.progress.refused == []
    weights = [torch.load(f"{folder}/model.pt", weights_only=True) for folder in ("whole", "spoiled")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_where_numbers_break_is_found(here):
    with new_run(config_for(here)) as run:
        model = run.parts.model
        micro = next(run.parts.micro_batches(0))

        def loss():
            return model(micro.x, micro.y, micro.seeds)[1]

        assert where_it_breaks(model, loss) == "nothing: it is finite now"
        hook = model.h[1].mlp.gelu.register_forward_hook(lambda module, inputs, output: output * math.inf)
        assert where_it_breaks(model, loss) == "output of h.1.mlp.gelu (GELU)"
        hook.remove()
        assert where_it_breaks(model, lambda: loss() * math.nan) == "the loss"
        hook = model.h[0].ln_1.weight.register_hook(lambda grad: grad * math.nan)
        assert where_it_breaks(model, loss) == "gradient of h.0.ln_1.weight"
        hook.remove()
        with torch.no_grad():
            model.ln_f.bias[0] = math.inf
        assert where_it_breaks(model, loss) == "weight ln_f.bias"


def test_refused_batches_leave_the_logged_mean_to_the_others(here):
    with new_run(config_for(here, max_steps=8, log_every=4)) as run:
        plant(run, math.nan, [2])
        losses = [event.loss.item() for event in train(run) if isinstance(event, Step)]
    rows = [row for row in read_record(Path("checkpoints")) if row["split"] == "train"]
    assert rows[1]["loss"] == pytest.approx(np.mean([losses[0], losses[2], losses[3]]))
    assert rows[1]["refused"] == [2]
    assert rows[2]["loss"] == pytest.approx(np.mean(losses[4:]))


def test_a_rollback_cuts_record_and_samples(here, monkeypatch):
    """An evaluation after the newest checkpoint happens again: its row and its sample stand there once."""
    monkeypatch.setattr("llm.train.save_is_due", lambda run, evaluated: run.progress.step == 4)
    with new_run(config_for(here, max_steps=12, log_every=1)) as run:
        plant(run, math.nan, [9, 10, 11])
        list(train(run))
    assert run.progress.rollbacks == 1
    assert [row["step"] for row in read_record(Path("checkpoints")) if row["split"] == "val"] == [0, 4, 8, 12]
    assert [sample.step for sample in read_samples(Path("checkpoints"))] == [0, 4, 8, 12]
    text = Path("checkpoints/samples.txt").read_text(encoding="utf-8")
    assert [line.split()[2] for line in text.splitlines() if line.startswith("--- step")] == ["0", "4", "8", "12"]
