"""What a run will take: against the model itself, PyTorch's counter, and what a small run really writes."""

import json
import math

import pytest
import torch
from conftest import SMALL, flags, words

from llm import GPT, GPTConfig, plan
from llm.commands.plan import main
from llm.config import TrainConfig, from_settings, read_toml
from llm.errors import UserError
from llm.plan import Chinchilla, Forecast, Pace

PACE = Pace(step=0.01, evaluated_token=1e-6, sampled_token=1e-3)
SHAPES = (
    {},
    {"bias": True, "tied_lm_head": True, "ffn_mult": 3},
    {"n_layer": 3, "n_embd": 24, "n_head": 3, "vocab_size": 70, "block_size": 9},
)


def small(**changes):
    return from_settings(SMALL | {"vocab_size": 30} | changes)


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_those_of_the_model(shape):
    config = GPTConfig(**{"vocab_size": 50, "n_embd": 16} | shape)
    model, counted = GPT(config), plan.parameters(config)
    assert sum(counted.values()) == sum(p.numel() for p in model.parameters())
    assert counted["embedding"] == model.wte.weight.numel()
    assert counted["positions"] == model.wpe.weight.numel()
    assert plan.flops_per_token(config) == model.flops_per_token()


def test_flops_are_those_that_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    config = small(dropout=0.1, gradient_accumulation_steps=3)  # with dropout attention is written out, so counted
    model, x = GPT(config.model), torch.zeros(config.windows_per_step, config.model.block_size, dtype=torch.int64)
    with FlopCounterMode(display=False) as counted:
        model(x)[0].sum().backward()
    assert plan.run_flops(config) == pytest.approx(config.max_steps * counted.get_total_flops(), rel=0.01)


def test_memory_grows_with_what_it_is_for():
    def parts(dtype=torch.float32, **changes):
        return plan.memory(small(**changes), dtype)

    before = parts()
    assert all(size >= 0 for size in before.values())
    assert before["optimizer state"] == 2 * before["weights"] == 2 * before["gradients"]
    assert before["low-precision copies"] == 0 < parts(torch.bfloat16)["low-precision copies"]
    assert parts(n_layer=4)["activations"] > 1.5 * before["activations"]
    assert parts(batch_size=8)["activations"] == 2 * before["activations"]
    assert parts(dropout=0.1)["activations"] > before["activations"]
    assert parts(gradient_accumulation_steps=4) == before  # one micro-batch at a time
    assert parts(n_embd=32)["weights"] > before["weights"]


def test_the_loss_buffer_is_bounded_as_the_loss_bounds_it():
    from llm.loss import _buffers, linear_cross_entropy

    config = from_settings({"vocab_size": 40_000, "n_embd": 4, "n_head": 1, "batch_size": 64})
    n = config.tokens_per_step
    linear_cross_entropy(torch.zeros(n, 4, requires_grad=True), torch.zeros(40_000, 4, requires_grad=True),
                         torch.zeros(n, dtype=torch.int64)).backward()  # fmt: skip
    held = 4 * _buffers[torch.device("cpu"), torch.float32].numel()
    assert plan.memory(config, torch.float32)["loss"] == held + n * 4 * 8


def test_disk_is_what_a_small_run_writes(here, losscurve):
    code, _, err = losscurve(f"train --text text.txt --out_dir run {flags(n_embd=64, keep=1, eval_every=3)}")
    assert code == 0, err
    config = from_settings(read_toml("run/config.toml"))
    tokens, vocabulary, known = plan.text_tokens(config)
    assert known
    found = plan.disk(plan.with_vocabulary(config, vocabulary), tokens)
    states = list((here / "run").glob("step-*"))
    held = sum(file.stat().st_size for folder in states for file in folder.iterdir())
    count = sum(plan.parameters(plan.with_vocabulary(config, vocabulary).model).values())
    assert held == pytest.approx(12 * count * len(states), rel=0.1)
    assert len(states) * 12 * count <= found["states"] == 2 * 12 * count
    weights = sum((here / "run" / name).stat().st_size for name in ("model.pt", "best.pt"))
    assert found["model.pt and best.pt"] == pytest.approx(weights, rel=0.1)
    files = sum(path.stat().st_size for path in here.rglob("*.bin"))
    assert found["token files"] == pytest.approx(files, rel=0.02)


def test_chinchilla_in_closed_form():
    assert plan.optimal_for_tokens(2e9) == Chinchilla(1e8, 2e9)
    best = plan.optimal_for_flops(120e18)  # 6 * N * 20 N
    assert best.parameters == pytest.approx(1e9)
    assert 6 * best.parameters * best.tokens == pytest.approx(120e18)


def test_evaluations_are_those_of_a_run():
    assert plan.evaluations(small(max_steps=12, eval_every=4)) == 4  # 0, 4, 8, 12
    assert plan.evaluations(small(max_steps=13, eval_every=4)) == 5


def test_time_is_the_sum_of_its_parts():
    found = plan.run_seconds(small(), 9000, PACE)
    assert found["steps"] == pytest.approx(12 * 0.01)
    assert found["evaluation"] == pytest.approx(4 * 1000 * 1e-6)  # a tenth of the text, at most eval_tokens
    assert found["samples"] == pytest.approx(4 * 5 * 1e-3)


def test_a_probe_measures_and_a_short_schedule_does_not_end_it():
    found = plan.probe(small(max_steps=1, warmup_steps=0), seconds=0.1)
    assert 0 < found.step < 5
    assert 0 < found.evaluated_token < found.step
    assert found.sampled_token > 0


def scaled(config):
    """A machine of 20 GFLOP/s."""
    return Pace(plan.flops_per_token(config.model) * config.tokens_per_step / 2e10, 1e-6, 1e-3)


@pytest.mark.parametrize("seconds", [60, 600, 36_000])
def test_a_proposal_fits_its_time_and_does_not_learn_the_text_by_heart(seconds):
    config, pace = plan.propose(small(block_size=64), 300_000, seconds, scaled)
    assert sum(plan.run_seconds(config, 300_000, pace).values()) <= seconds
    assert config.max_steps * config.tokens_per_step <= plan.EPOCHS * 300_000
    assert pace == scaled(config)


def test_a_larger_text_and_more_time_give_a_larger_model():
    shapes = [
        plan.propose(small(block_size=64), tokens, seconds, scaled)[0].model.n_embd
        for tokens, seconds in ((10_000, 60), (10**9, 3_600), (10**9, 360_000))
    ]
    assert shapes == sorted(set(shapes))


def test_a_proposal_says_when_there_is_no_time():
    with pytest.raises(UserError, match="give more time"):
        plan.propose(small(), 1000, 1.0, scaled)


def test_a_proposal_is_written_as_train_reads_it(here, capsys, monkeypatch):
    monkeypatch.setattr(plan, "probe", scaled)
    monkeypatch.setattr(plan.propose, "__defaults__", (scaled,))
    (here / "text.txt").write_text(words(3000), encoding="utf-8")
    assert main(["--text", "text.txt", "--tokenizer", "char", "--time", "1m", "--out", "found.toml"]) == 0
    assert "found.toml" in capsys.readouterr().out
    settings = read_toml("found.toml")
    config = from_settings(settings)
    assert config.text == ("text.txt",)
    assert "vocab_size" not in settings  # the text's own
    tokens, vocabulary, _ = plan.text_tokens(config)
    expected, _ = plan.propose(plan.with_vocabulary(config, vocabulary), tokens, 60, scaled)
    assert plan.with_vocabulary(config, vocabulary) == expected


def test_a_plan_in_words_and_in_json(here, capsys, monkeypatch):
    monkeypatch.setattr(plan, "probe", lambda config: PACE)
    given = f"--text text.txt {flags()}".split()
    assert main(given) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("parameters", "optimizer state", "disk", "GFLOP", "estimated", "Chinchilla"))
    assert main([*given, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["seconds"]["steps"] == pytest.approx(0.12)
    assert not (here / "data").exists()
    assert main(["--text", "-", *flags().split()]) == 0
    assert "not known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("--time soon", "time = 'soon'"),
        ("--time -5", "time"),
        ("--time 0", "time = '0'"),
        ("--out plan.json", "plan.json"),
        ("--text nowhere.txt", "nowhere.txt"),
        ("--n_head 3", "n_head = 3"),
        ("--tiem 5m", "did you mean --time"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(here, given, named):
    with pytest.raises(UserError) as caught:
        main(given.split())
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_outline_is_two_lines():
    found = plan.outline(TrainConfig(), 300_000)
    assert len(found.splitlines()) == 2
    assert "0.75 tokens per parameter" in found  # 10.24 M of them, 13.67 M parameters


def test_a_forecast_of_a_steady_run_is_right():
    config = small(max_steps=100, eval_every=50)
    forecast, said = Forecast(config), []
    for step in range(1, 101):
        bookkeeping = 3.0 * (1 + (step - 1) // 50)  # an evaluation of 3 s at the start, at 50 and at 100
        said.append(forecast.at(step, 0.5 * step + bookkeeping, bookkeeping))
    lines = [line for line in said if line]
    assert len(lines) == 1
    assert said.index(lines[0]) == Forecast.SETTLED
    assert forecast.predicted == pytest.approx(50 + 3 * 3)
    assert forecast.ended(59.0 * 1.25) == "predicted 59 s, took 74 s (+25%)"


def test_a_run_too_short_to_settle_makes_no_forecast():
    forecast = Forecast(small())
    assert all(forecast.at(step, float(step), 0.0) is None for step in range(1, 13))
    assert forecast.ended(12.0) is None


def test_a_resumed_run_forecasts_from_its_own_steps():
    forecast = Forecast(small(max_steps=100, eval_every=50), step=40, seconds=1000.0)
    for step in range(41, 62):
        forecast.at(step, 1000.0 + (step - 40), 0.0)
    assert math.isclose(forecast.predicted, 1060.0)
