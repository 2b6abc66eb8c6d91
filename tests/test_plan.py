"""The plan of a run, compared with the model, with PyTorch's counter, and with what a small run writes."""

import json
import math
import os
import re
import subprocess
import sys
import weakref

import pytest
import torch
from conftest import MEDIAN, SMALL, flags
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import llm.loss
from llm.arch import make_model
from llm.commands.planning.plan import main
from llm.config import TrainConfig, from_settings, read_toml
from llm.config.counts import count_parameters
from llm.errors import UserError
from llm.loss import BLOCK_BYTES, chunk_rows
from llm.machine.device import precision
from llm.optim import make_optimizer
from llm.plan import arithmetic, forecast, text_size, timing
from llm.plan import forecast as forecast_module
from llm.plan.forecast import Forecast
from llm.plan.text_size import Text
from llm.plan.timing import Pace

PACE = Pace(step=0.01, evaluated_token=1e-6, sampled_token=1e-3)


def small(**changes):
    return from_settings(SMALL | {"vocab_size": 30} | changes)


def test_flops_are_those_that_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    config = small(dropout=0.1, gradient_accumulation_steps=3)  # with dropout attention is written out, so counted
    model, x = (
        make_model(config.model),
        torch.zeros(config.windows_per_step, config.model.block_size, dtype=torch.int64),
    )
    with FlopCounterMode(display=False) as counted:
        model(x)[0].sum().backward()
    assert arithmetic.run_flops(config) == pytest.approx(config.max_steps * counted.get_total_flops(), rel=0.01)


def test_memory_grows_with_the_setting_that_needs_it():
    def parts(**changes):
        return arithmetic.memory(small(**changes))

    before = parts()
    assert all(size >= 0 for size in before.values())
    assert before["optimizer state"] == 2 * before["weights"] == 2 * before["gradients"]
    assert before["low-precision copies"] == 0 < parts(dtype="bfloat16")["low-precision copies"]
    assert parts(n_layer=4)["activations"] > 1.5 * before["activations"]
    assert parts(batch_size=8)["activations"] == 2 * before["activations"]
    assert parts(dropout=0.1)["activations"] > before["activations"]
    assert parts(gradient_accumulation_steps=4) == before  # one micro-batch at a time
    assert parts(n_embd=32)["weights"] > before["weights"]
    recomputed = [parts(n_layer=n, activation_checkpointing=True)["activations"] for n in (8, 9)]
    assert recomputed[1] - recomputed[0] == 4 * 16 * 4 * 16  # windows, positions, bytes, channels: the residual stream
    assert recomputed[0] < parts(n_layer=8)["activations"] / 3


def held(config):
    """Return the bytes that a forward pass saves for backward: each storage once, without the parameters."""
    model, kept = make_model(config.model), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # kept alive, so that no address is reused
        return tensor

    x = torch.zeros(config.batch_size, config.model.block_size, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        precision(getattr(torch, config.dtype), torch.device("cpu")),
    ):
        model.hidden(x)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.1},
        {"block_size": 32, "ffn_mult": 3},
        {"arch": "llama"},
        {"arch": "llama", "dropout": 0.1, "n_kv_head": 1},
        {"arch": "llama", "block_size": 32, "ffn_dim": 96, "qk_norm": False},
    ],
)
def test_a_block_keeps_what_autograd_keeps_of_it(dtype, changes):
    def planned(config):
        found = arithmetic.memory(config)
        return found["activations"] + found["low-precision copies"]

    few, many = (small(n_embd=64, n_head=4, batch_size=16, dtype=dtype, n_layer=n, **changes) for n in (2, 5))
    assert planned(many) - planned(few) == pytest.approx(held(many) - held(few), rel=0.02)


def test_a_block_with_dropout_keeps_softmax_in_float32_on_a_gpu(monkeypatch):
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, dim: softmax(x.float(), dim))  # as its autocast does
    monkeypatch.setattr("llm.model.Block.may_fuse", False)
    changes = {"n_embd": 64, "n_head": 4, "batch_size": 16, "block_size": 32, "dropout": 0.1, "dtype": "bfloat16"}
    few, many = (small(n_layer=n, **changes) for n in (2, 5))
    planned = [arithmetic.memory_for(config, False, 2) for config in (few, many)]
    sizes = [found["activations"] + found["low-precision copies"] for found in planned]
    assert sizes[1] - sizes[0] == pytest.approx(held(many) - held(few), rel=0.02)


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_holds_no_more_than_is_planned(monkeypatch, tied):
    """Compare with the exponentials of a chunk of rows, whose memory the embedding's gradient takes later."""
    plain, alive, held = llm.loss.exp_sum, weakref.WeakValueDictionary(), []

    def exp_sum(x, shift):
        alive[id(x)] = x
        held.append(sum(x.numel() * x.element_size() for x in alive.values()))
        return plain(x, shift)

    monkeypatch.setattr(llm.loss, "exp_sum", exp_sum)
    sizes = {"vocab_size": 40_000, "n_embd": 4, "n_head": 1, "batch_size": 64, "tied_lm_head": tied}
    config = from_settings(sizes | {"dtype": "float32"})
    n = config.tokens_per_step
    hidden, weight = (torch.zeros(size, 4, requires_grad=True) for size in (n, 40_000))
    llm.loss.linear_cross_entropy(hidden, weight, torch.zeros(n, dtype=torch.int64)).backward()
    embedding = 0 if tied else 4 * 4 * 40_000
    assert max(held) > 8 * embedding
    block = chunk_rows(n, 40_000, 4, on_cpu=True) * BLOCK_BYTES  # one of the chunk before may live a little longer
    assert 0 <= max(held) - (arithmetic.memory(config)["loss"] - n * 4 * 8 + embedding) <= block


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations allocate within it and that are still alive."""

    def __init__(self):
        super().__init__()
        self.sizes, self.highest = {}, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in inputs:
                self.add(x.untyped_storage())
        return out

    def add(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            weakref.finalize(storage, self.sizes.pop, key, None)
        self.highest = max(self.highest, sum(self.sizes.values()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"arch": "llama", "n_kv_head": 1}, {"arch": "llama", "ffn_dim": 64}])
def test_an_update_by_muon_takes_no_more_than_is_planned(dtype, changes):
    config = small(n_layer=6, n_embd=64, n_head=4, optimizer="muon", dtype=dtype, **changes)
    model = make_model(config.model)
    optimizer = make_optimizer(model, config, getattr(torch, dtype))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with LiveBytes() as live:
        optimizer.step()
    planned = arithmetic.muon_excess({}, config, True, getattr(torch, dtype).itemsize)
    assert live.highest == pytest.approx(planned, rel=0.1)
    assert arithmetic.muon_excess({"loss": planned - 7}, config, True, getattr(torch, dtype).itemsize) == 7


def test_the_peak_memory_of_a_process_is_what_it_allocated():
    code = "from llm.plan.arithmetic import peak_memory as p; before = p(); x = bytearray(2**28); print(p() - before)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(finished.stdout) == pytest.approx(2**28, rel=0.1)


def test_a_machine_that_is_too_small_is_not_probed(here, capsys, monkeypatch):
    assert arithmetic.machine_memory() > 2**28
    for module in (arithmetic, timing):
        monkeypatch.setattr(module, "machine_memory", lambda: 2**20)
    assert main(["--text", "text.txt", *flags().split()]) == 0
    assert "does not fit in the memory here" in capsys.readouterr().out
    with pytest.raises(UserError, match="not even the smallest model fits"):
        main(["--text", "text.txt", "--time", "10m"])


def test_disk_is_what_a_small_run_writes(here, losscurve):
    code, _, err = losscurve(f"train --text text.txt --out_dir run {flags(n_embd=64, keep=1, eval_every=3)}")
    assert code == 0, err
    config = from_settings(read_toml("run/config.toml"))
    text = text_size.text_of(config)
    assert text.unprepared == 0
    config = text_size.with_vocabulary(config, text.vocabulary)
    found = arithmetic.disk(config, text.tokens)
    states = list((here / "run").glob("step-*"))
    held = sum(file.stat().st_size for folder in states for file in folder.iterdir())
    count = count_parameters(config.model)
    assert held == pytest.approx(12 * count * len(states), rel=0.1)
    assert len(states) * 12 * count <= found["checkpoints"] == 2 * 12 * count
    weights = sum((here / "run" / name).stat().st_size for name in ("model.pt", "best.pt"))
    assert found["model.pt and best.pt"] == pytest.approx(weights, rel=0.1)
    files = sum(path.stat().st_size for path in here.rglob("*.bin"))
    assert found["token files"] == pytest.approx(files, rel=0.02)


def test_chinchilla_in_closed_form():
    best = arithmetic.optimal_parameters(120e18)  # 6 * N * 20 N
    assert best == pytest.approx(1e9)


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_a_text_is_estimated_before_it_is_prepared(here, losscurve, tokenizer):
    (here / "more").mkdir()
    (here / "more" / "b.md").write_text("é" * 3000, encoding="utf-8")
    (here / "more" / "c.bin").write_bytes(b"no text")
    config = from_settings({"text": ["text.txt", "more"], "tokenizer": tokenizer})
    before = text_size.text_of(config)
    size = (here / "text.txt").stat().st_size + 6000
    assert before.unprepared == size
    losscurve(f"prepare text.txt more --tokenizer {tokenizer} --data_dir data/text-{tokenizer}")
    after = text_size.text_of(config)
    assert after.unprepared == 0
    if tokenizer == "bpe":
        assert before.vocabulary == 4096
    else:  # the split is by characters, and those at the end have two bytes
        off = 0.1 if tokenizer == "byte" else 2 / after.tokens
        assert (before.tokens, before.vocabulary) == (pytest.approx(after.tokens, rel=off), after.vocabulary)


def test_evaluations_are_those_of_a_run():
    assert arithmetic.count_evaluations(small(max_steps=12, eval_every=4)) == 4  # 0, 4, 8, 12
    assert arithmetic.count_evaluations(small(max_steps=13, eval_every=4)) == 5


def test_time_is_the_sum_of_its_parts():
    found = timing.run_seconds(small(), Text(9000, 30), PACE)
    assert found["steps"] == pytest.approx(12 * 0.01)
    assert found["evaluation"] == pytest.approx(4 * 1000 * 1e-6)  # a tenth of the text, at most eval_tokens
    assert found["samples"] == pytest.approx(4 * 5 * 1e-3)
    assert (
        timing.run_seconds(small(), Text(9000, 30, 20 * timing.TOKENIZING_RATE), PACE)["starting"]
        == found["starting"] + 20
    )


def test_a_probe_counts_the_cores_that_others_keep_busy(monkeypatch):
    """A program that is always busy shows; the steps of the probe itself do not, however long it has trained before."""
    if timing.seconds_of_others() is None:
        pytest.skip("this system does not tell")
    monkeypatch.setattr(timing, "_median_seconds", MEDIAN)
    config = small()
    alone = timing.probe(config, seconds=0.5).others
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            beside = timing.probe(config, seconds=0.5).others
        finally:
            busy.kill()
    assert beside > alone + 0.3 or beside > os.cpu_count() - 1.5  # the second: the machine was full before
    assert timing.busy_line(Pace(1, 1, 1, others=0.2 * os.cpu_count())) == ""
    assert "other work kept" in timing.busy_line(Pace(1, 1, 1, others=0.3 * os.cpu_count()))


def test_seconds_of_others_are_those_of_the_system_without_our_own(monkeypatch):
    """/proc/stat counts user, nice, system, idle, waiting, two kinds of interrupts, and what a host took away."""
    content = "cpu  1000 200 300 9999 9999 40 50 60 7777 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    monkeypatch.setattr(timing.Path, "read_text", lambda path: content)
    monkeypatch.setattr(timing.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(timing.time, "process_time", lambda: 1.5)
    assert timing.seconds_of_others() == 16.5 - 1.5
    monkeypatch.setattr(timing, "seconds_of_others", lambda: 14.0)
    assert timing._cores_of_others(12.0, 4.0) == 0.5
    assert timing._cores_of_others(None, 4.0) == 0  # a system that does not tell


def test_a_probe_measures_and_a_short_schedule_does_not_end_it():
    found = timing.probe(small(max_steps=1, warmup_steps=0), seconds=0.1)
    assert 0 < found.step < 5
    assert 0 < found.evaluated_token < found.step
    assert found.sampled_token > 0


def test_a_long_step_is_extrapolated_from_short_ones(monkeypatch):
    """The clock advances with training only: 5 ms for the optimizer, and 20 ms for each window."""
    clock, done = [0.0], []

    class Loss:
        loss = torch.zeros(())

    def train_step(parts, step):
        clock[0] += 0.005 + 0.02 * parts.config.windows_per_step
        done.append(parts.config.windows_per_step)
        return Loss

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing, "train_step", train_step)
    for name in ("_evaluated_token_seconds", "_sampled_token_seconds"):
        monkeypatch.setattr(timing, name, lambda parts, budget: 1.0)
    for batch, micro_batches in ((12, 40), (1024, 1), (8, 1), (4, 2)):
        config = small(batch_size=batch, gradient_accumulation_steps=micro_batches)
        assert timing.probe(config).step == pytest.approx(0.005 + 0.02 * config.windows_per_step)
    assert max(done) <= 128
    assert clock[0] < 30


@pytest.mark.parametrize("late", [{1}, {2}, {3}, {4, 6}, {5, 9}, {7}, {8}, {11}])
def test_occasional_other_work_does_not_change_an_extrapolated_step(monkeypatch, late):
    """As above, but other work delays some steps by 3 s. No single measurement decides the result."""
    clock, done = [0.0], []

    class Loss:
        loss = torch.zeros(())

    def train_step(trainer, step):
        done.append(trainer.config.windows_per_step)
        clock[0] += 0.005 + 0.02 * trainer.config.windows_per_step + (3.0 if len(done) in late else 0.0)
        return Loss

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing, "train_step", train_step)
    for name in ("_evaluated_token_seconds", "_sampled_token_seconds"):
        monkeypatch.setattr(timing, name, lambda parts, budget: 1.0)
    config = small(batch_size=1024)
    assert timing.probe(config).step == pytest.approx(0.005 + 0.02 * 1024)
    assert max(done) >= 16


def test_one_window_is_never_taken_for_a_whole_step(monkeypatch):
    """Two micro-batches seem to take no longer than one, because other work ended in between."""
    clock = [0.0]

    class Loss:
        loss = torch.zeros(())

    def train_step(trainer, step):
        clock[0] += 1.0
        return Loss

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing, "train_step", train_step)
    for name in ("_evaluated_token_seconds", "_sampled_token_seconds"):
        monkeypatch.setattr(timing, name, lambda parts, budget: 1.0)
    assert timing.probe(small(batch_size=1024)).step > 100


def test_a_plan_in_words_and_in_json(here, capsys, monkeypatch):
    monkeypatch.setattr(timing, "probe", lambda config: PACE)
    given = f"--text text.txt {flags()}".split()
    assert main(given) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("parameters", "optimizer state", "disk", "GFLOP", "estimated", "Chinchilla"))
    assert main([*given, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["seconds"]["steps"] == pytest.approx(0.12)
    assert not (here / "data").exists()
    assert main([*given, "--max_time", "1s"]) == 0
    assert "max_time ends it after 1 s" in capsys.readouterr().out


def test_the_weights_of_init_from_decide_the_shape(here, capsys, losscurve, monkeypatch):
    monkeypatch.setattr(timing, "probe", lambda config: PACE)
    losscurve(f"train --text text.txt {flags(n_embd=32)}")
    capsys.readouterr()
    assert main(["--text", "text.txt", "--init_from", "checkpoints", "--batch_size", "4"]) == 0
    assert "n_embd 32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("--out plan.json", "plan.json"),
        ("--text nowhere.txt", "nowhere.txt"),
        ("--text empty.txt", "the text is empty"),
        ("--data_dir nowhere", "nowhere"),
        ("--n_head 3", "n_head = 3"),
        ("--tiem 5m", "did you mean --time"),
        ("--init_from nowhere", "nowhere"),
    ],
)
def test_a_wrong_flag_is_an_error_of_one_line(here, given, named):
    (here / "empty.txt").touch()
    with pytest.raises(UserError) as caught:
        main(given.split())
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_outline_is_two_lines():
    found = forecast.outline(TrainConfig(), 300_000)
    assert len(found.splitlines()) == 2
    assert "0.749 tokens per parameter" in found  # 10.24 M of them, 13.67 M parameters
    assert found.endswith("the text suits 15,000 parameters")
    assert forecast.outline(TrainConfig(), 3_000).endswith("the text suits 150 parameters")
    assert forecast.outline(TrainConfig(), 30_000_000).endswith("the text suits 1.5 M parameters")


@pytest.mark.parametrize(
    ("seconds", "text"), [(47.7, "47.7 s"), (990, "16.5 min"), (36_000, "10 h"), (864_000, "10.0 days")]
)
def test_a_duration_has_a_unit_that_fits(seconds, text):
    assert forecast.spoken(seconds) == text


def test_a_forecast_of_a_steady_run_is_right(monkeypatch):
    monkeypatch.setattr(forecast_module, "peak_memory", lambda: 500 * 2**20)
    config = small(max_steps=100, eval_every=50)
    forecast = Forecast(config)
    lines = []
    for step in range(1, 101):
        bookkeeping = 3.0 * (1 + (step - 1) // 50)  # an evaluation of 3 s at the start, at 50 and at 100
        lines.append(forecast.at(step, 0.5 * step + bookkeeping, bookkeeping))
    assert [line for line in lines if line] == ["at 0.5 s a step, this run will take about 59 s"]
    assert lines.index("at 0.5 s a step, this run will take about 59 s") == Forecast.STEPS
    assert forecast.predicted == pytest.approx(50 + 3 * 3)
    ended = forecast.ended(59.0 * 1.25)
    assert ended.startswith("predicted 59 s, took 73.8 s: 20% too low; ")
    assert ended.endswith(" MiB, took less than the 500 MiB before the first step")
    monkeypatch.setattr(forecast_module, "peak_memory", lambda: 501 * 2**20)
    assert re.search(r"; \d+ MiB, took 501 MiB: (\d+% too (low|high)|right)$", forecast.ended(59.0))
    assert ": right; " in forecast.ended(59.0)


def test_a_run_too_short_for_a_known_pace_has_no_forecast():
    for cast, seconds in ((Forecast(small()), 10.0), (Forecast(small(max_steps=1000)), 0.004)):
        assert all(cast.at(step, step * seconds, 0.0) is None for step in range(1, cast.config.max_steps + 1))
        assert cast.ended(12.0) is None


def test_a_forecast_includes_max_time_and_the_time_before_a_resume():
    for max_time, expected in ((None, 1109.0), (1080.0, 1080.0)):
        forecast = Forecast(small(max_steps=100, eval_every=50, max_time=max_time))
        for step in range(41, 72):
            bookkeeping = 3.0 * (1 + (step - 1) // 50)  # of all evaluations of the run
            forecast.at(step, 1000.0 + step + bookkeeping, bookkeeping)
        assert math.isclose(forecast.predicted, expected)


def test_a_run_prints_its_outline_and_the_error_of_its_forecast(here, losscurve, monkeypatch):
    monkeypatch.setattr(Forecast, "STEPS", 2)
    monkeypatch.setattr(Forecast, "SECONDS", 0.0)
    # nothing is measured before the first step: neither the pace nor bfloat16
    for module, name in ((timing, "probe"), (timing, "choose_dtype"), (arithmetic, "choose_dtype")):
        monkeypatch.setattr(module, name, lambda *args: torch.float32 if args[0] == "float32" else 1 / 0)
    code, out, err = losscurve(f"train --text text.txt {flags()}")
    assert code == 0, err
    lines, config = out.splitlines(), from_settings(read_toml("checkpoints/config.toml"))
    first = next(number for number, line in enumerate(lines) if line.startswith("step     0"))
    text = text_size.text_of(config)
    outline = forecast.outline(text_size.with_vocabulary(config, text.vocabulary), text.tokens)
    assert lines[first - 2 : first] == outline.splitlines()
    (note,) = [line for line in err.splitlines() if "this run will take" in line]
    assert note.startswith("note: at ")
    assert re.match(r"predicted .* s, took .* s: (\d+% too (low|high)|right); ", lines[-2])
    assert lines[-1] == "saved checkpoints/model.pt"
    code, out, err = losscurve(
        f"train --text text.txt --out_dir patient {flags(max_lr=1e-9, warmup_steps=0)} --patience 1"
    )
    assert code == 0, err
    assert "no improvement" in out
    assert "predicted" not in out


@pytest.mark.parametrize("text", ["hello world", "", "x", "hello world " * 3])
@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe", "auto"])
def test_a_text_that_train_refuses_is_refused_with_the_same_message(here, losscurve, text, tokenizer):
    (here / "tiny.txt").write_text(text, encoding="utf-8")
    given = f"--text tiny.txt --tokenizer {tokenizer} --block_size 64"
    code, out, err = losscurve(f"plan {given}")
    assert (code, out) == (2, "")
    assert not (here / "data").exists()
    assert losscurve(f"train {given}")[2].splitlines()[-1] == err.splitlines()[-1]


def test_token_files_that_are_too_short_are_refused_as_train_refuses_them(here, losscurve):
    assert losscurve("prepare text.txt --tokenizer byte")[0] == 0
    for size in (5000, 20_000):
        code, out, err = losscurve(f"plan --data_dir data --block_size {size}")
        assert (code, out) == (2, "")
        assert f"and a window needs {size + 1}" in err
        assert losscurve(f"train --data_dir data --block_size {size}")[2] == err
