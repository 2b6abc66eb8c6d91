"""The loop against a plain loop written here, and against itself: resumed, accumulated, repeated."""

import dataclasses
import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, config_for, steps_in, trained, words

from llm import GPT, GPTConfig
from llm.commands.train_lines import end_lines
from llm.config import from_settings
from llm.data import batch_at
from llm.errors import UserError
from llm.prepare.prepare import prepare
from llm.record.metrics import read_record
from llm.run import Run, fit
from llm.start.new_run import new_run
from llm.start.resume_run import resume_run
from llm.storage.checkpoint import saved_steps
from llm.train import train, train_step
from llm.training.events import Line, Saved, Step

# Losses of 50 steps of `golden_settings`, on one machine, fp32. Another CPU may add up in another
# order: a change of the mathematics shows at 1e-3 or more, rounding stays below 1e-4.
GOLDEN = {0: 2.48239, 1: 2.48314, 2: 2.42562, 5: 2.26572, 10: 2.01095, 20: 1.65226, 30: 1.54254, 49: 1.71738}


def plain_loop(config, model, tokens, steps):
    """The chapter's loop in its own words, with our batches: a loss for each step."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.max_lr, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    losses = []
    for step in range(steps):
        if step < config.warmup:
            lr = config.max_lr * step / config.warmup
        else:
            t = (step - config.warmup) / (config.max_steps - config.warmup)
            lr = config.final_lr + 0.5 * (config.max_lr - config.final_lr) * (1 + math.cos(math.pi * t))
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = batch_at(tokens, config.seed, step, config.batch_size, config.model.block_size)
        logits, _ = model(torch.from_numpy(batch.x))
        loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.y).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_loop_is_the_chapters(here):
    config = config_for(here, max_steps=40, eval_every=10, log_every=1)
    run, events = trained(config)
    torch.manual_seed(config.seed)
    model = GPT(run.parts.config.model)
    losses = plain_loop(run.parts.config, model, run.parts.data.train, 40)
    ours = [event.loss.item() for event in events if isinstance(event, Step)]
    assert ours == pytest.approx(losses, abs=1e-4)
    for (name, a), b in zip(model.state_dict().items(), run.parts.model.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-4), name
    lines = [event for event in events if isinstance(event, Line)]
    assert [line.step for line in lines] == [0, 10, 20, 30, 40]
    assert lines[0].train_loss == pytest.approx(losses[0], abs=1e-5)
    for line in lines[1:]:
        assert line.train_loss == pytest.approx(np.mean(losses[line.step - 10 : line.step]), abs=1e-4)
    assert losses[-1] < losses[0] - 0.5


def test_lines_are_in_the_chapters_form(here):
    _, events = trained(config_for(here))
    line = next(str(event) for event in events if isinstance(event, Line))
    head, lr, train, val, t = line.split(" | ")
    assert head == "step     0"
    assert lr == "lr 0.00000"
    assert len(train.removeprefix("train ").split(".")[1]) == len(val.removeprefix("val ").split(".")[1]) == 4
    assert t.startswith("t ")
    assert t.endswith("s")


def test_a_run_of_50_steps_keeps_its_losses(tmp_path, monkeypatch):
    """The golden trace: any change of model, data order, schedule, optimizer or initialisation shows."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(words(2000, seed=1), encoding="utf-8")
    config = from_settings(
        SMALL | {"text": "text.txt", "max_steps": 50, "eval_every": 50, "dtype": "float32", "device": "cpu", "seed": 7}
    )
    _, events = trained(config)
    losses = [event.loss.item() for event in events if isinstance(event, Step)]
    for step, expected in GOLDEN.items():
        assert losses[step] == pytest.approx(expected, abs=1e-3), step


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dropout": 0.3, "gradient_accumulation_steps": 2, "grad_clip": 1.0},
        {"dtype": "bfloat16", "weight_decay_split": True, "tied_lm_head": True},
        {"dtype": "float16"},
        {"dtype": "float16", "optimizer": "muon", "dropout": 0.3},
    ],
    ids=["plain", "dropout", "bfloat16", "float16", "muon"],
)
@pytest.mark.parametrize("stop_at", [4, 7])
def test_a_resumed_run_is_the_run_never_stopped(here, settings, stop_at):
    """Stopped after any step, on an evaluation or between: weights and record are bitwise the same."""
    _, _ = trained(config_for(here, out_dir="whole", **settings))
    with new_run(config_for(here, out_dir="parts", **settings)) as run:
        run.stop = lambda: run.progress.step == stop_at
        list(train(run))
    assert run.reason == "interrupted"
    with resume_run(Path("parts"), {}) as run:
        assert run.progress.step == stop_at
        list(train(run))
    assert run.reason == "done"
    for name in ("model.pt", "best.pt"):
        whole, parts = (torch.load(Path(folder) / name, weights_only=True) for folder in ("whole", "parts"))
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
    records = []
    for folder in ("whole", "parts"):
        timeless = [
            {k: v for k, v in row.items() if "second" not in k and k != "matmul_utilisation"}
            for row in read_record(Path(folder))
        ]
        records.append(timeless)
    assert records[0] == records[1]
    assert Path("whole/samples.txt").read_bytes() == Path("parts/samples.txt").read_bytes()


def test_rows_beyond_the_saved_step_are_cut_on_resume(here):
    trained(config_for(here, max_steps=8))
    with open("checkpoints/metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 9, "split": "train", "loss": 1.0}) + "\n" + '{"step": 10, "spl')
    with resume_run(Path("checkpoints"), {"max_steps": 12}) as run:
        list(train(run))
    rows = read_record(Path("checkpoints"))
    assert [row["step"] for row in rows if row["split"] == "val"] == [0, 4, 8, 12]
    assert [row["step"] for row in rows if row["split"] == "train"] == [0, 2, 4, 6, 8, 10, 12]


def test_a_run_goes_on_only_with_its_own_data(here):
    Path("data").mkdir()
    for split in ("train", "val"):  # files of unknown origin, so that only their bytes tell them apart
        np.arange(300, dtype="<u2").tofile(f"data/{split}.bin")
    config = from_settings(SMALL | {"data_dir": "data", "vocab_size": 400, "tokenizer": "auto", "max_steps": 4})
    trained(config)
    np.arange(1, 301, dtype="<u2").tofile("data/val.bin")
    with (
        pytest.raises(UserError, match="not the data this run was trained on"),
        resume_run(Path("checkpoints"), {"max_steps": 8}),
    ):
        pass


@pytest.mark.parametrize("split", [(1, 4), (2, 2)])
def test_accumulation_changes_nothing_even_with_dropout(here, split):
    """1 x 4, 2 x 2 and 4 x 1 windows are one batch: same losses, same weights, same draws of dropout."""
    settings = {"dropout": 0.4, "max_steps": 6, "log_every": 1}
    whole, first = trained(config_for(here, batch_size=4, out_dir="a", **settings))
    size, steps = split
    parts, second = trained(
        config_for(here, batch_size=size, gradient_accumulation_steps=steps, out_dir="b", **settings)
    )
    for a, b in zip(steps_in(first), steps_in(second), strict=True):
        assert a.loss.item() == pytest.approx(b.loss.item(), abs=1e-5)
    for a, b in zip(whole.parts.model.parameters(), parts.parts.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_one_batch_can_be_learned_by_heart(here):
    config = config_for(here, n_embd=32, max_steps=300, max_lr=1e-2)
    with new_run(config) as run:
        parts = run.parts
        start = len(parts.data.train) - 200
        parts.data = dataclasses.replace(parts.data, train=parts.data.train[start : start + 17])
        for step in range(300):
            loss = train_step(parts, step).loss.item()
    assert loss < 0.05


def test_gradients_are_clipped(here):
    with new_run(config_for(here, grad_clip=0.01)) as run:
        before = train_step(run.parts, 0).grad_norm
        after = math.sqrt(sum(p.grad.norm().item() ** 2 for p in run.parts.model.parameters()))
    assert before > 0.1
    assert after == pytest.approx(0.01, rel=1e-3)


def test_max_time_stops_with_everything_saved(here):
    run, events = trained(config_for(here, max_steps=10**6, max_time=1.0, eval_every=10**6))
    assert run.reason == "max_time"
    assert isinstance(events[-1], Saved)
    assert events[-1].step == run.progress.step < 10**6
    assert read_record(Path("checkpoints"))[-1]["split"] == "val"
    assert run.parts.config.max_steps == 10**6
    with pytest.raises(UserError, match="max_time"), resume_run(Path("checkpoints"), {}):
        pass


def test_a_last_loss_that_is_not_finite_is_said(here):
    run, _ = trained(config_for(here, max_steps=4, eval_every=4))
    run.progress.last_loss = None
    assert "last val not finite at step 4" in "\n".join(end_lines(run))


def test_patience_stops_when_nothing_improves(here):
    run, _ = trained(config_for(here, max_steps=400, max_lr=0.05, patience=2, schedule="constant"))
    assert run.reason == "patience"
    val = [row["loss"] for row in read_record(Path("checkpoints")) if row["split"] == "val"]
    assert min(val) == val[-3] == run.progress.best_loss
    assert run.progress.best_step in saved_steps(Path("checkpoints"))


def test_compile_gives_the_same_losses(here):
    """With a teacher, whose predictions enter the compiled forward pass and its gradients."""
    trained(config_for(here, out_dir="first", seed=3, max_lr=0.1))
    taught = {"teacher": "first", "max_steps": 5, "log_every": 1}
    said, said_compiled = [], []
    _, plain = trained(config_for(here, out_dir="a", **taught), say=said.append)
    _, compiled = trained(config_for(here, out_dir="b", **taught, compile=True), say=said_compiled.append)
    assert said_compiled == said  # and not that it does not work
    for a, b in zip(steps_in(plain), steps_in(compiled), strict=True):
        assert a.loss.item() == pytest.approx(b.loss.item(), abs=1e-5)
        assert a.grad_norm.item() == pytest.approx(b.grad_norm.item(), abs=1e-5)


def test_compiled_gradients_repeat_themselves(here):
    torch.set_num_threads(2)  # one alone has nothing to race with
    try:
        with new_run(config_for(here, batch_size=32, n_embd=64, block_size=64, compile=True)) as run:
            parts, seen = run.parts, set()
        micro = next(parts.micro_batches(0))
        for _ in range(20):
            parts.optimizer.zero_grad()
            parts.forward(micro.x, micro.y, micro.seeds)[1].backward()
            seen.add(tuple(p.grad.sum().item() for p in parts.model.parameters()))
    finally:
        torch.set_num_threads(1)
    assert len(seen) == 1


def test_compile_that_fails_is_said_and_done_without(here, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler found\nmany more lines")

    monkeypatch.setattr(torch, "compile", lambda function: broken)
    said = []
    run, _ = trained(config_for(here, max_steps=2, compile=True, warmup_steps=0), say=said.append)
    assert run.reason == "done"
    assert said == ["torch.compile does not work here, training without it (no compiler found)"]


def test_fine_tuning_starts_from_the_saved_weights(here):
    first, _ = trained(config_for(here, out_dir="first"))
    with pytest.raises(UserError, match="n_layer = 5: the weights of first have 2"):
        trained(config_for(here, out_dir="second", init_from="first", n_layer=5))
    with new_run(config_for(here, out_dir="second", init_from="first")) as run:
        best = torch.load("first/best.pt", weights_only=True)
        assert all(torch.equal(best[name], p) for name, p in run.parts.model.state_dict().items())
        line = next(event for event in train(run) if isinstance(event, Line))
    assert line.evaluation.loss == pytest.approx(first.progress.best_loss, abs=1e-5)


def test_the_best_may_be_the_start(here):
    """A first evaluation that nothing betters has its best.pt, and a speed that can be true."""
    run, _ = trained(config_for(here, max_steps=2, eval_every=1, warmup_steps=0, max_lr=1.0))
    assert run.progress.best_step == 0
    assert Path("checkpoints/best.pt").exists()
    assert Path("checkpoints/step-000000/manifest.json").exists()
    assert 0 < run.progress.bookkeeping < run.progress.seconds


def test_the_last_evaluation_has_its_picture(here, monkeypatch):
    drawn = []
    monkeypatch.setattr("llm.training.evaluating.PICTURE_PACE", 1e9)
    monkeypatch.setattr(
        "llm.training.evaluating.plot_runs", lambda runs, _: drawn.append(read_record(runs[0])[-1]["step"])
    )
    trained(config_for(here, max_steps=6, eval_every=2, warmup_steps=0))
    assert drawn == [2, 6]


def test_bare_weights_are_gpt2s(here):
    prepare(("text.txt",), Path("bytes"), "byte")
    torch.manual_seed(0)
    torch.save(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=16)).state_dict(), "bare.pt")
    torch.save(GPT(GPTConfig(vocab_size=300, n_layer=1, n_head=2, n_embd=8, block_size=16)).state_dict(), "small.pt")
    settings = {"max_steps": 1, "data_dir": "bytes", "n_head": 2}
    with pytest.raises(UserError, match="bytes holds byte tokens, not gpt2"):
        trained(from_settings(settings | {"init_from": "bare.pt"}))
    with pytest.raises(UserError, match=r"no tokenizer\.json beside it says what its 300 tokens are"):
        trained(from_settings(settings | {"init_from": "small.pt"}))


def test_an_interrupt_in_a_notebook_saves(here):
    said = []

    def say(line):
        said.append(line)
        if line.startswith("step     4"):
            signal.raise_signal(signal.SIGINT)

    fit(here / "text.txt", out_dir="run", say=say, **SMALL)
    assert "saved step 4; continue with fit(out_dir='run', resume=True)" in said
    fit(out_dir="run", resume=True, say=said.append)
    assert said[-1].startswith("step    12")


def test_fine_tuning_on_another_text_keeps_the_tokenizer(here):
    trained(config_for(here, out_dir="first", max_steps=3, tokenizer="bpe", vocab_size=300, warmup_steps=0))
    Path("other.txt").write_text("zzz yyy abc " * 200, encoding="utf-8")
    settings = {"text": "other.txt", "init_from": "first", "max_steps": 2, "warmup_steps": 0}
    run, _ = trained(from_settings(SMALL | settings | {"tokenizer": "auto", "out_dir": "second"}))
    assert run.reason == "done"
    saved = [Path(folder, "tokenizer.json").read_bytes() for folder in ("first", "second", "data/other-for-first")]
    assert saved[0] == saved[1] == saved[2]
    with pytest.raises(UserError, match="know bpe tokens"):
        trained(config_for(here, init_from="first", tokenizer="char", out_dir="x"))
    prepare(("other.txt",), Path("chars"), "char")
    with pytest.raises(UserError, match="chars holds char tokens, not bpe"):
        trained(from_settings(SMALL | {"data_dir": "chars", "init_from": "first", "tokenizer": "auto", "out_dir": "x"}))
    prepare(("other.txt",), Path("otherbpe"), "bpe", 280)
    with pytest.raises(UserError, match="not those that first was trained on"):
        trained(
            from_settings(SMALL | {"data_dir": "otherbpe", "init_from": "first", "tokenizer": "auto", "out_dir": "x"})
        )


@pytest.mark.pictures
def test_a_run_is_a_record_a_plot_and_a_sample(here):
    said = []
    run = fit(here / "text.txt", out_dir=here / "run", say=said.append, **SMALL)
    assert sum(line.startswith("step ") for line in said) == 4
    assert run.path == here / "run"
    assert Run.open(here / "run").config.model.n_embd == 16
    assert run.sample("ab", max_new_tokens=7, seed=1).startswith("ab")
    assert len(run.sample("ab", max_new_tokens=7, seed=1)) == 9
    run.plot(here / "again.svg")
    assert (here / "again.svg").stat().st_size > 5000
    assert run._repr_png_().startswith(b"\x89PNG")
    names = {path.name for path in (here / "run").iterdir()}
    assert names >= {"config.toml", "metrics.jsonl", "env.json", "tokenizer.json", "samples.txt", "loss_curve.png"}
    assert names >= {"model.pt", "best.pt", "step-000012"}
    assert not any("tmp" in name for name in names)
    row = run.record[-1]
    assert set(row) == {
        "step", "split", "loss", "bits_per_byte", "lr", "grad_norm", "tokens", "seconds", "tokens_per_second",
        "matmul_utilisation", "data_seconds", "val_loss_ema",
    }  # fmt: skip
    model = GPT(run.config.model)
    model.load_state_dict(torch.load(here / "run" / "model.pt", weights_only=True))
