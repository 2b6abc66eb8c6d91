"""One, two and four processes are one run: against a plain loop written here, against one process, against each other.

All worlds of a size do their jobs in one go, see `told`; what the jobs came to is compared here.
"""

import logging
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import ranks
import torch
import torch.distributed.run
import torch.nn.functional as F
from conftest import SMALL, environment, flags, with_small, words
from ranks import job, values, world_of
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from llm import GPT
from llm.checks.verify import verify
from llm.commands import launch, train
from llm.data import batch_at, open_data
from llm.errors import UserError
from llm.machine.rendezvous import described
from llm.record.metrics import read_record
from llm.storage import checkpoint
from llm.tokens.prepare import prepare
from llm.weights import run_config

STEPS, STATE = 8, 5
RUN = SMALL | {
    "batch_size": 4,
    "gradient_accumulation_steps": 4,  # so 1 process takes 4 micro-batches, 2 take 2, 4 take 1
    "dropout": 0.2,
    "grad_clip": 0.5,
    "max_steps": STEPS,
    "log_every": 1,
    "save_every": STATE,
    "keep": 9,
}
TWO = RUN | {"gradient_accumulation_steps": 2, "grad_clip": 0.0}  # 2 processes x 1 against 1 process x 2
# fp32: the sums of a step are taken in another order; 8 steps make of 1e-7 at most this
CLOSE = {"float32": 2e-6, "bfloat16": 4e-3}
TORTURE = bool(os.environ.get("LOSSCURVE_TORTURE"))
SIZES, KINDS = (1, 2, 4), ("ddp", "fsdp")
EVALUATIONS = [(16 * 128 * 5 + 8, 10**6), (16 * 128 * 2 + 1, 10**6), (40, 10**6), (2, 10**6), (10**5, 16 * 128 * 3)]


# saved by, gone on with by: some of the 49 pairs, the others are for make torture
PAIRS = [((2, "ddp"), (0, "ddp")), ((0, "ddp"), (2, "fsdp")), ((4, "fsdp"), (2, "ddp")), ((1, "fsdp"), (4, "ddp"))]
PAIRS += [((2, "fsdp"), (2, "fsdp")), ((4, "ddp"), (4, "ddp"))]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with token files."""
    place = tmp_path_factory.mktemp("ranks")
    (place / "text.txt").write_text(words(900), encoding="utf-8")
    prepare((str(place / "text.txt"),), place / "data", "char")
    return place


def settings(place, name, **more):
    return RUN | {"data_dir": str(place / "data"), "out_dir": str(place / name)} | more


def jobs_of(place, size):
    """What a world of `size` does, by name; 0 is a process without torchrun."""
    jobs = {}
    for dtype in CLOSE:
        for kind in KINDS if size else KINDS[:1]:
            name = f"{size} {kind} {dtype}"
            more = {"parallel": kind, "dtype": dtype}
            jobs[f"{kind} {dtype}"] = job(ranks.train, settings=settings(place, name, **more))
            begin = settings(place, f"{name} evaluated", init_from=str(place / "first"), **more)
            jobs[f"{kind} {dtype} evaluated"] = job(ranks.evaluated, settings=begin, cases=EVALUATIONS)
    for kind in KINDS if size in (0, 2) else ():
        if size or kind == "ddp":
            two = settings(place, f"{size} {kind} two", **TWO | {"parallel": kind})
            jobs[f"{kind} two"] = job(ranks.train, settings=two)
    if size == 2:
        for kind in KINDS:
            again = settings(place, f"{kind} again", parallel=kind, activation_checkpointing=True)
            jobs[f"{kind} again"] = job(ranks.train, settings=again)
        offload = settings(place, "offload", parallel="fsdp", cpu_offload=True)
        jobs["offload"] = job(ranks.train, settings=offload)
    return jobs


@pytest.fixture(scope="module")
def told(place):
    """By size of the world and name of the job: what each rank tells of it."""
    first = settings(place, "first", dropout=0.0)
    values(world_of(0, [job(ranks.train, settings=first)], place / "told first")[0])
    found = {}
    for size in (0, *SIZES):
        jobs = jobs_of(place, size)
        done = world_of(size, list(jobs.values()), place / f"told {size}")
        found[size] = {name: values(of) for name, of in zip(jobs, done, strict=True)}
    return found


def joined(told, name):
    """What all ranks saw of a step, joined by rank: by step and name, one row a window."""
    per_step = len(told[0]["seen"][name]) // len(told[0]["losses"])
    return [
        torch.cat([torch.cat(one["seen"][name][at : at + per_step]) for one in told])
        for at in range(0, len(told[0]["seen"][name]), per_step)
    ]


def plain_loop(config, tokens, steps):
    """The whole batch at once in PyTorch's own words: losses, norms of the gradient, weights."""
    torch.manual_seed(config.seed)
    model = GPT(config.model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=config.weight_decay)
    losses, norms = [], []
    for step in range(steps):
        lr = config.max_lr * step / config.warmup
        if step >= config.warmup:
            t = (step - config.warmup) / (config.max_steps - config.warmup)
            lr = config.final_lr + 0.5 * (config.max_lr - config.final_lr) * (1 + math.cos(math.pi * t))
        batch = batch_at(tokens, config.seed, step, config.windows_per_step, config.model.block_size)
        hidden = model.hidden(torch.from_numpy(batch.x), seeds=torch.from_numpy(batch.seeds))
        loss = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), torch.from_numpy(batch.y).flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item())
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, dict(model.named_parameters())


def furthest(a, b):
    """The largest difference between two sets of weights."""
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def runs(told):
    for size in (0, *SIZES):
        for kind in KINDS if size else KINDS[:1]:
            for dtype in CLOSE:
                yield size, kind, dtype, told[size][f"{kind} {dtype}"]


def test_the_same_windows_in_the_same_order_and_the_same_draws(place, told):
    config = run_config(place / "0 ddp float32")
    tokens = open_data(place / "data", 16).train
    alone = told[0]["ddp float32"]
    drawn = [name for name in alone[0]["seen"] if name.startswith("dropout")]
    assert len(drawn) == 1 + 3 * config.model.n_layer
    for size, kind, dtype, ours in runs(told):
        per_rank = {name: joined(ours, name) for name in ("x", "y", "seeds")}
        assert len(per_rank["x"]) == STEPS
        for step in range(STEPS):
            batch = batch_at(tokens, config.seed, step, 16, 16)
            for name, seen in per_rank.items():
                assert np.array_equal(seen[step].numpy(), getattr(batch, name)), (size, kind, dtype, step, name)
        for name in drawn if dtype == "float32" else ():  # in bfloat16 a score may round to nothing
            for step, (a, b) in enumerate(zip(joined(ours, name), joined(alone, name), strict=True)):
                assert torch.equal(a, b), (size, kind, name, step)
    shares = [len(told[size]["ddp float32"][0]["seen"]["x"]) // STEPS for size in SIZES]
    assert shares == [4, 2, 1]  # micro-batches of a process


def test_losses_norms_and_weights_are_those_of_a_plain_loop(place, told):
    config = run_config(place / "0 ddp float32")
    losses, norms, weights = plain_loop(config, open_data(place / "data", 16).train, STEPS)
    assert max(norms) > config.grad_clip  # it does clip
    for size, kind, dtype, ours in runs(told):
        close, what = CLOSE[dtype] * 5, (size, kind, dtype)
        for one in ours:
            assert one["losses"] == pytest.approx(losses, abs=close), what
            assert one["norms"] == pytest.approx(norms, rel=close * 5), what
            assert furthest(one["weights"], weights) < close, what


def test_any_number_of_processes_and_either_kind_comes_to_the_same(place, told):
    """Against one process without torchrun, in the same precision, by the weights and by the record."""
    for size, kind, dtype, ours in runs(told):
        alone, what = told[0][f"ddp {dtype}"][0], (size, kind, dtype)
        for one in ours:
            assert furthest(one["weights"], alone["weights"]) <= (0 if size == 0 else CLOSE[dtype]), what
            assert furthest(one["weights"], ours[0]["weights"]) == 0, what
            assert one["losses"] == ours[0]["losses"], what
        rows, expected = (read_record(place / f"{n} {k} {dtype}") for n, k in ((size, kind), (0, "ddp")))
        assert [(row["step"], row["split"], row["lr"]) for row in rows] == [
            (row["step"], row["split"], row["lr"]) for row in expected
        ]
        for row, other in zip(rows, expected, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], abs=CLOSE[dtype]), what
            assert row["tokens"] == other["tokens"]
            if row.get("grad_norm"):
                assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=CLOSE[dtype] * 10), what
        assert sum(row["split"] == "val" for row in rows) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_two_micro_batches_bit_for_bit(told, kind):
    """A sum of two numbers, and a half of it, is the same in any order."""
    alone, two = told[0]["ddp two"][0], told[2][f"{kind} two"]
    for one in two:
        assert one["losses"] == alone["losses"]
        assert furthest(one["weights"], alone["weights"]) == 0


@pytest.mark.parametrize("dtype", CLOSE)
def test_an_evaluation_is_exactly_the_same_for_any_number_of_processes(told, dtype):
    expected = told[0][f"ddp {dtype} evaluated"][0]
    assert [tokens for _, _, tokens in expected] == [*(count - 1 for count, _ in EVALUATIONS[:-1]), 16 * 128 * 3]
    assert len({loss for loss, _, _ in expected}) == len(EVALUATIONS)
    for size in SIZES:
        for kind in KINDS:
            assert told[size][f"{kind} {dtype} evaluated"] == [expected] * size, (size, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_computed_twice_change_nothing(told, kind):
    """Bit for bit, with dropout."""
    assert told[2][f"{kind} again"][0]["losses"] == told[2][f"{kind} float32"][0]["losses"]
    assert furthest(told[2][f"{kind} again"][0]["weights"], told[2][f"{kind} float32"][0]["weights"]) == 0
    twice, once = (len(told[2][f"{kind} {how}"][0]["seen"]["dropout 2"]) for how in ("again", "float32"))
    assert twice == 2 * once  # it did compute them twice


def test_weights_kept_on_the_cpu_change_nothing(told):
    assert furthest(told[2]["offload"][0]["weights"], told[2]["fsdp float32"][0]["weights"]) <= CLOSE["float32"]


def test_the_files_of_a_run_are_those_of_one_process(place, told):
    one = torch.load(place / "0 ddp float32/model.pt", weights_only=True)
    for size, kind, dtype, ours in runs(told):
        folder = place / f"{size} {kind} {dtype}"
        assert [found for found in verify(folder) if found.good is False] == []
        for name in ("model.pt", "best.pt"):
            weights = torch.load(folder / name, weights_only=True)
            assert {k: (v.dtype, v.shape) for k, v in weights.items()} == {
                k: (v.dtype, v.shape) for k, v in one.items()
            }
            GPT(run_config(folder).model).load_state_dict(weights)
        weights = torch.load(folder / "model.pt", weights_only=True)
        assert all(torch.equal(weights[name], p) for name, p in ours[0]["weights"].items())
        groups, _ = checkpoint.load_state(folder / f"step-{STEPS:06d}")
        expected, _ = checkpoint.load_state(place / f"0 ddp float32/step-{STEPS:06d}")
        assert {(g, k): v.shape for g, t in groups.items() for k, v in t.items()} == {
            (g, k): v.shape for g, t in expected.items() for k, v in t.items()
        }


@pytest.fixture(scope="module")
def gone_on(place, told):
    """What ranks tell of a run saved by one world and gone on with by another, by ((size, kind), (size, kind))."""
    found = {}
    for size in (0, *SIZES):
        jobs = {}
        for source in [(0, "ddp"), *((n, kind) for n in SIZES for kind in KINDS)]:
            for kind in KINDS if size else KINDS[:1]:
                if not TORTURE and (source, (size, kind)) not in PAIRS:
                    continue
                folder = place / f"{source[0]} {source[1]} gone on by {size} {kind}"
                shutil.copytree(place / f"{source[0]} {source[1]} float32", folder)
                shutil.rmtree(folder / f"step-{STEPS:06d}")  # as if it had been killed before its last state
                changes = {"out_dir": str(folder), "parallel": kind}
                jobs[source, (size, kind)] = job(ranks.train, settings=changes, resume=True)
        done = world_of(size, list(jobs.values()), place / f"told going on {size}")
        found |= {pair: values(of) for pair, of in zip(jobs, done, strict=True)}
    return found


def test_saved_by_any_number_and_gone_on_with_by_any_other(place, told, gone_on, record_property):
    """The state as it was saved, the moments included; then the very next batch; then the undisturbed run's curve."""
    tokens, whole = open_data(place / "data", 16).train, told[0]["ddp float32"][0]
    config = run_config(place / "0 ddp float32")
    rows = read_record(place / "0 ddp float32")
    assert len(gone_on) == (7 * 7 if TORTURE else len(PAIRS))
    for (source, target), ours in gone_on.items():
        saved, _ = checkpoint.load_state(place / f"{source[0]} {source[1]} float32" / f"step-{STATE:06d}")
        for one in ours:
            groups, step = one["start"]
            assert step == STATE
            assert groups["optimizer"].keys() == saved["optimizer"].keys()
            assert any(value.abs().max() > 0 for name, value in groups["optimizer"].items() if "exp_avg" in name)
            for group, tensors in saved.items():
                for name, value in tensors.items():
                    assert torch.equal(groups[group][name], value), (source, target, group, name)
            assert one["losses"] == pytest.approx(whole["losses"][STATE:], abs=CLOSE["float32"]), (source, target)
            assert furthest(one["weights"], whole["weights"]) <= CLOSE["float32"], (source, target)
        for step, x in enumerate(joined(ours, "x"), STATE):
            assert np.array_equal(x.numpy(), batch_at(tokens, config.seed, step, 16, 16).x), (source, target, step)
        again = read_record(place / f"{source[0]} {source[1]} gone on by {target[0]} {target[1]}")
        assert [(row["step"], row["split"]) for row in again] == [(row["step"], row["split"]) for row in rows]
        if source[0] == target[0] and source[1] == target[1]:  # the same arithmetic: nothing may differ
            undisturbed = told[source[0]][f"{source[1]} float32"][0]
            assert furthest(ours[0]["weights"], undisturbed["weights"]) == 0, (source, target)
    record_property("saved by N, resumed by M", len(gone_on))


REFUSED = {  # what is not as it should be -> (lines by rank, what makes a rank another, words of the error)
    "other tokens": (["", "--data_dir other/data"], None, r"train\.bin is \w+ on rank 0 .* and \w+ on rank 1"),
    "other settings": (["", "--max_lr 0.5"], None, r"max_lr is 0\.01 on rank 0 .* and 0\.5 on rank 1"),
    "another version": ([""], ranks.another_version, r"losscurve is [\d.]+\S* on rank 0 .* and 0\.0\.9 on rank 1"),
    "other code": ([""], ranks.other_code, r"the code of losscurve is \w+ on rank 0 .* and f{64} on rank 1"),
    "no tokens": (["", "--data_dir nowhere"], None, r"rank 1 on \S+: nowhere/train\.bin: no such file"),
    "a torn file": (["", "--data_dir torn"], None, r"rank 1 on \S+: torn/train\.bin: .* not a whole number"),
    "windows": (["--batch_size 3"], None, r"= 3 windows do not divide among 2 processes"),
    "offload": (["--cpu_offload"], None, r"cpu_offload: works with --parallel fsdp only"),
    "compile": (["--parallel fsdp --compile"], None, r"compile: does not work with --parallel fsdp"),
    "float16": (["--parallel fsdp --dtype float16"], None, r"float16'.* does not work with --parallel fsdp"),
    "a device": (["", "--device cuda:99"], None, r"rank 1 on \S+: device = 'cuda:99'"),
    "no run": (["--resume"], None, r"holds no run|no config\.toml|no such file|not a run"),
    "a wrong flag": (["", "--n_lair 3"], None, r"unknown argument --n_lair"),
}


def test_what_cannot_work_together_is_refused_by_name_in_one_line(place, monkeypatch):
    monkeypatch.chdir(place)
    prepare((str(place / "text.txt"),), place / "other/data", "char", val_fraction=0.2)
    shutil.copytree(place / "data", place / "torn")
    (place / "torn/meta.json").unlink()
    with open(place / "torn/train.bin", "ab") as file:
        file.write(b"x")
    jobs = []
    for lines, change, _ in REFUSED.values():
        both = [line if "--resume" in line else with_small(line) for line in lines]
        both = [f"train {line} --out_dir refused" for line in both]
        both = [line if "--data_dir" in line or "--resume" in line else f"{line} --data_dir data" for line in both]
        jobs.append(job(ranks.command, lines=both, change=change))
    for (what, (_, _, said)), told in zip(REFUSED.items(), world_of(2, jobs, place / "told refused"), strict=True):
        assert values(told) == [2, 2], what
        errors = [[line for line in one.err.splitlines() if "error" in line.lower()] for one in told]
        assert len(errors[0] + errors[1]) == 1, (what, errors)
        assert re.search(said, (errors[0] + errors[1])[0]), (what, errors)
        assert not (place / "refused").exists(), what


def test_what_goes_wrong_later_is_told_too(place, monkeypatch):
    """A folder that holds a run is refused on all ranks, by rank 0 alone, and left as it is."""
    monkeypatch.chdir(place)
    values(world_of(0, [job(ranks.train, settings=settings(place, "held", max_steps=3))], place / "told held")[0])
    before = {path: path.read_bytes() for path in (place / "held").rglob("*") if path.is_file()}
    line = f"train {flags()} --data_dir data --out_dir held"
    told = world_of(4, [job(ranks.command, lines=[line])], place / "told again")[0]
    assert values(told) == [2] * 4
    assert [one.err.count("error: ") for one in told] == [1, 0, 0, 0]
    assert "holds a run saved at step 3" in told[0].err
    assert {path: path.read_bytes() for path in (place / "held").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "given",
    [
        {"RANK": "-1", "WORLD_SIZE": "0"},
        {"RANK": "2"},
        {"LOCAL_RANK": "2"},
        {"MASTER_PORT": "99999"},
        {"MASTER_PORT": "x"},
        {"MASTER_ADDR": None},
    ],
)
def test_what_no_torchrun_says_is_refused(monkeypatch, given):
    told = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in (told | given).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="start processes with torchrun, or unset RANK"):
        described()


def test_what_is_handed_to_torchrun(monkeypatch):
    handed = []
    monkeypatch.setattr(os, "execve", lambda path, words, env: handed.append(words))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("RANK", raising=False)
    train.main(["--text", "a b.txt", "--nproc", "2", "--max_steps", "7"])
    assert handed[0][1:] == [
        *("-m", "llm.commands.launch", "--standalone", "--nproc_per_node=2", "-m", "llm", "train"),
        *("--text=a b.txt", "--max_steps=7"),
    ]


@pytest.mark.parametrize(
    ("work", "last"),
    [
        ("print('error: x; try y', file=sys.stderr); sys.exit(2)", "error: x; try y"),
        ("1 / 0", "ZeroDivisionError: division by zero"),  # a traceback comes through
    ],
)
def test_the_last_line_of_several_processes_is_ours(tmp_path, work, last):
    (tmp_path / "work.py").write_text(f"import os, sys\nif os.environ['RANK'] == '1': {work}\n", encoding="utf-8")
    command = [sys.executable, "-m", "llm.commands.launch", "--standalone", "--nproc_per_node=2", tmp_path / "work.py"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == last
    assert ended.stderr.count("Traceback") == last.startswith("Zero")
    assert "site-packages" not in ended.stderr


def test_a_process_that_a_signal_ended_is_named(monkeypatch, capsys):
    def fail(args):
        raise ChildFailedError("llm", {1: ProcessFailure(1, 4711, -9, "<N/A>")})

    monkeypatch.setattr(torch.distributed.run, "run", fail)
    monkeypatch.setattr(logging, "disable", lambda level: None)
    assert launch.main(["--nproc_per_node=2", "work.py"]) == 1
    said = "error: rank 1 (process 4711) was ended by SIGKILL (often: out of memory); go on with --resume\n"
    assert capsys.readouterr().err == said
