"""The average of the weights against a plain loop in float64, and in what a run saves, prints and resumes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import config_for, steps_in, trained
from test_rollback import plant
from torch import nn

from llm.checks.prove import fingerprint
from llm.config import TrainConfig
from llm.errors import UserError
from llm.evaluate import Evaluation, evaluate
from llm.plan.arithmetic import bytes_copied_to_save, disk, memory
from llm.record.metrics import best, overfits_since, read_record
from llm.record.verdicts import overfits
from llm.start.new_run import new_run
from llm.start.resume_run import resume_run
from llm.storage.checkpoint import load_state, newest_state
from llm.train import train
from llm.training.averaging import Average
from llm.training.evaluating import note_evaluation
from llm.training.events import Line, Step
from llm.training.state import restore_average

EMA = {"ema": 0.8, "schedule": "constant", "log_every": 1}


def followed(run):
    """Train; return the weights before the first step and after each, in float64, and the steps."""

    def now():
        return {name: p.detach().double().clone() for name, p in run.parts.model.named_parameters()}

    weights, events = [now()], []
    for event in train(run):
        events.append(event)
        if isinstance(event, Step):
            weights.append(now())
    return weights, events


def plain_average(weights, accepted, decay):
    """The average after the steps whose numbers are `accepted`, by the definition."""
    average = {name: value.numpy().copy() for name, value in weights[0].items()}
    for updates, step in enumerate(accepted):
        d = min(decay, (1 + updates) / (10 + updates))
        for name, value in weights[step].items():
            average[name] = d * average[name] + (1 - d) * value.numpy()
    return average


@pytest.mark.parametrize(("decay", "refused"), [(0.8, []), (0.3, []), (0.999, [3, 6])])
def test_it_is_a_plain_loop_over_the_accepted_steps(here, decay, refused):
    with new_run(config_for(here, **EMA | {"ema": decay})) as run:
        plant(run, math.nan, refused, "gradient")
        weights, events = followed(run)
    accepted = [step.step for step in steps_in(events) if step.step not in refused]
    assert len(accepted) == 12 - len(refused)
    expected = plain_average(weights, accepted, decay)
    saved = load_state(Path("checkpoints/step-000012"))[0]["ema"]
    assert saved.pop("updates") == len(accepted)
    assert saved.keys() == expected.keys()
    for name, value in saved.items():
        assert value.dtype == torch.float32
        assert np.abs(value.double().numpy() - expected[name]).max() < 1e-6, name
    assert max(np.abs(expected[name] - weights[-1][name].numpy()).max() for name in expected) > 1e-3


def test_a_step_that_was_not_accepted_changes_no_bit():
    model = nn.Linear(3, 2)
    average = Average(model, 0.5)
    with torch.no_grad():
        model.weight += 1
    average.update(torch.tensor(True))
    before = {name: value.clone() for name, value in average.tensors().items()}
    with torch.no_grad():
        model.weight += 1
    average.update(torch.tensor(False))
    assert all(torch.equal(before[name], value) for name, value in average.tensors().items())


def test_in_place_exchanges_and_gives_back_every_bit():
    model = nn.Linear(3, 2)
    average = Average(model, 0.5)
    first = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 0.1
    now = model.weight.detach().clone()
    with average.in_place():
        assert torch.equal(model.weight, first)
        assert torch.equal(average.weights["weight"], now)
    assert torch.equal(model.weight, now)
    assert torch.equal(average.weights["weight"], first)


def test_each_evaluation_has_the_loss_of_the_average(here, losscurve):
    run, events = trained(config_for(here, **EMA))
    rows = [row for row in read_record(Path("checkpoints")) if row["split"] == "val"]
    lines = [event for event in events if isinstance(event, Line)]
    assert [line.averaged for line in lines] == [row["val_loss_ema"] for row in rows]
    assert rows[0]["val_loss_ema"] == rows[0]["loss"]
    assert f" | val {rows[-1]['loss']:.4f} | ema {rows[-1]['val_loss_ema']:.4f} | t " in str(lines[-1])
    model = run.parts.model
    weights = load_state(Path("checkpoints/step-000012"))[0]["ema"]
    del weights["updates"]
    assert model.load_state_dict(weights, strict=False).unexpected_keys == []
    assert evaluate(model, run.parts.data.val, 16, 10**6).loss == rows[-1]["val_loss_ema"] != rows[-1]["loss"]


@pytest.mark.parametrize("tied", [True, False])
def test_evaluate_takes_the_average_of_a_checkpoint(here, losscurve, tied):
    trained(config_for(here, tied_lm_head=tied, **EMA))
    last = [row for row in read_record(Path("checkpoints")) if row["split"] == "val"][-1]
    code, out, err = losscurve("evaluate checkpoints/step-000012 --weights average --json")
    assert code == 0, err
    (found,) = json.loads(out)
    assert found["weights"] == "checkpoints/step-000012 (average)"
    assert found["loss"] == last["val_loss_ema"]
    for weights in ("last", "best"):
        _, out, _ = losscurve(f"evaluate checkpoints/step-000012 --weights {weights} --json")
        assert json.loads(out)[0]["loss"] == last["loss"] != last["val_loss_ema"]
    code, _, err = losscurve("evaluate checkpoints --weights average")
    assert (code, err) == (
        2,
        "error: checkpoints: only a checkpoint (step-000500) has the average of the weights; leave --weights out\n",
    )
    assert losscurve("train --text text.txt --overwrite --max_steps 1 --n_layer 1 --n_embd 16 --tokenizer char")[0] == 0
    code, _, err = losscurve("evaluate checkpoints/step-000001 --weights average")
    assert (code, err[:60]) == (2, "error: checkpoints/step-000001: has no average of the weights"[:60])


def test_without_it_nothing_is_there(here):
    _, events = trained(config_for(here))
    assert "ema" not in Path("checkpoints/metrics.jsonl").read_text()
    assert not [event for event in events if isinstance(event, Line) and "ema" in str(event)]
    assert newest_state(Path("checkpoints"))[0].keys() == {"model", "optimizer"}


def test_it_changes_no_bit_of_the_training(here):
    for name, more in (("with", {"ema": 0.9}), ("without", {})):
        trained(config_for(here, out_dir=name, dropout=0.2, **more))
    weights = [torch.load(f"{name}/model.pt") for name in ("with", "without")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(("first", "second", "kept"), [(2.0, 1.5, "ema"), (2.0, 2.0, "raw"), (1.5, 2.0, "raw")])
def test_best_holds_the_better_of_the_two_and_says_which(here, losscurve, monkeypatch, first, second, kept):
    monkeypatch.setattr("llm.training.evaluating.average_loss", lambda run: second)
    monkeypatch.setattr("llm.training.evaluating.validation_loss", lambda run: Evaluation(first, 1.0, 10))
    monkeypatch.setattr("llm.train.save_is_due", lambda run, evaluated: True)
    code, out, err = losscurve("train text.txt --preset chapter --max_steps 1 --eval_every 1 --tokenizer char " + TINY)
    assert code == 0, err
    step = best(read_record(Path("checkpoints")))
    assert (step["step"], step["loss"]) == (0, min(first, second))
    assert step["bits_per_byte"] == pytest.approx(min(first, second) / first)
    assert ("by the average of the weights, which best.pt holds" in out) == (kept == "ema")
    state = json.loads(Path("checkpoints/step-000000/state.json").read_text())
    assert state["progress"]["best_weights"] == kept


TINY = "--ema 0.9 --n_layer 1 --n_head 1 --n_embd 8 --block_size 8 --batch_size 2 --warmup_steps 0 --sample_tokens 0"


def test_the_files_hold_the_last_weights_and_the_better_ones(here, monkeypatch):
    monkeypatch.setattr("llm.training.evaluating.average_loss", lambda run: 1 / (1 + run.progress.step))
    run, _ = trained(config_for(here, **EMA))
    groups = load_state(Path("checkpoints/step-000012"))[0]
    last, better = (torch.load(f"checkpoints/{name}.pt") for name in ("model", "best"))
    assert run.progress.best_weights == "ema"
    assert last.keys() == better.keys()
    for name, value in groups["model"].items():
        assert torch.equal(last[name], value)
        assert torch.equal(better[name], groups["ema"][name])


def test_the_lower_loss_counts(here):
    with new_run(config_for(here, ema=0.9)) as run:
        seen = []
        for raw, averaged in [(3.0, 3.0), (2.0, 2.5), (2.2, 1.9), (1.95, 2.0), (math.nan, 1.0), (1.8, 1.8)]:
            note_evaluation(run, Evaluation(raw, None, 10), averaged)
            seen.append((run.progress.best_loss, run.progress.best_weights, run.progress.stale))
            run.progress.step += 1
    assert seen[:3] == [(3.0, "raw", 0), (2.0, "raw", 0), (1.9, "ema", 0)]
    assert seen[3:] == [(1.9, "ema", 1), (1.9, "ema", 2), (1.8, "raw", 0)]


def test_a_better_average_alone_is_no_overfitting():
    rows = [
        {"step": 10 * i, "split": "val", "loss": 3.0 - 0.01 * i, "val_loss_ema": loss, "bits_per_byte": None}
        for i, loss in enumerate([3.0, 2.0, 2.1, 2.2])
    ]
    assert best(rows)["step"] == 10
    assert overfits_since(rows) is None


def test_overfitting_names_the_weights_that_best_pt_holds():
    losses = [(3.0, 3.0), (2.0, 1.9), (2.1, 2.0), (2.2, 2.1)]
    rows = [
        {"step": 10 * i, "split": "val", "loss": raw, "val_loss_ema": average, "bits_per_byte": None}
        for i, (raw, average) in enumerate(losses)
    ]
    assert overfits(rows, TrainConfig()).endswith("best.pt has the average of the weights of step 10")
    alone = [row | {"val_loss_ema": None} for row in rows]
    assert overfits(alone, TrainConfig()).endswith("best.pt has the weights of step 10")


def test_stopped_at_any_step_and_resumed_it_is_the_same_run(here):
    settings = EMA | {"dropout": 0.2, "order": "epochs", "schedule": "wsd", "decay_fraction": 0.5, "save_every": 3}
    with new_run(config_for(here, out_dir="whole", **settings)) as run:
        list(train(run))
    expected = fingerprint(Path("whole"))
    assert any(name.startswith("ema at step") for name in expected)
    for step in (2, 7, 11):
        with new_run(config_for(here, out_dir="parts", **settings), overwrite=True) as run:
            for event in train(run):
                if isinstance(event, Step) and event.step == step:
                    break
        with resume_run(Path("parts"), {}) as run:
            list(train(run))
        assert fingerprint(Path("parts")) == expected, step


def test_a_rollback_takes_the_average_back(here):
    """Spoiled in the weights or in the average itself, the run ends as if nothing had been."""
    trained(config_for(here, out_dir="whole", **EMA))
    for spoil in ("weights", "average"):
        with new_run(config_for(here, out_dir=spoil, **EMA)) as run:
            for event in train(run):
                if isinstance(event, Step) and event.step == 6 and run.progress.rollbacks == 0:
                    with torch.no_grad():
                        average = run.parts.average.weights["wpe.weight"]
                        (run.parts.model.wpe.weight if spoil == "weights" else average)[0, 0] = math.nan
        assert run.progress.rollbacks == 1
        found, whole = (newest_state(Path(name))[0]["ema"] for name in (spoil, "whole"))
        assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_an_average_of_another_model_is_refused():
    average = Average(nn.Linear(3, 2), 0.5)
    with pytest.raises(UserError, match="average of the weights does not fit"):
        restore_average(average, Average(nn.Linear(3, 1), 0.5).tensors())
    with pytest.raises(UserError, match="average of the weights does not fit"):
        restore_average(average, {})


def test_the_plan_counts_it(here):
    plain, averaged = config_for(here, device="cpu"), config_for(here, device="cpu", ema=0.9)
    with new_run(averaged) as run:
        count = sum(p.numel() for p in run.parts.model.parameters())
        plain, averaged = (type(plain)(**{**vars(c), "model": run.parts.config.model}) for c in (plain, averaged))
    assert memory(averaged)["average of the weights"] == 4 * count
    assert bytes_copied_to_save(averaged) - bytes_copied_to_save(plain) == 4 * count
    assert sum(memory(averaged).values()) - sum(memory(plain).values()) == 8 * count
    states = [disk(config, 1000)["checkpoints"] for config in (averaged, plain)]
    assert states[0] / states[1] == pytest.approx(16 / 12)
