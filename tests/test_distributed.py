"""One, two and four processes train the same run: compared with a plain loop, with one process, and with each other.

The fixture `outcomes` runs all jobs of each world size at once; the tests compare what they returned.
"""

import math
import os
import shutil

import numpy as np
import pytest
import rank_jobs
import torch
import torch.distributed.run
import torch.nn.functional as F
from conftest import SMALL, words
from ranks import job, require_values, run_job, run_world

from llm import GPT
from llm.checks.verify import verify
from llm.data import batch_at, open_data
from llm.prepare.prepare import prepare
from llm.record.metrics import read_record
from llm.storage import checkpoint
from llm.weights import run_config

STEPS, STATE = 6, 4
RUN = SMALL | {
    "batch_size": 4,
    "gradient_accumulation_steps": 4,  # so 1 process takes 4 micro-batches, 2 take 2, 4 take 1
    "dropout": 0.2,
    "grad_clip": 0.5,
    "ema": 0.5,  # so its evaluations, and the average that is saved by N and resumed by M, are compared too
    "max_steps": STEPS,
    "log_every": 1,
    "save_every": STATE,
    "keep": 9,
}
TWO = RUN | {"gradient_accumulation_steps": 2, "grad_clip": 0.0}  # 2 processes x 1 against 1 process x 2
LLAMA = TWO | {"arch": "llama", "n_kv_head": 1}  # in bfloat16 its blocks are fused, but not under FSDP
MUON = RUN | {"optimizer": "muon", "n_embd": 6, "dropout": 0.0, "activation_checkpointing": True}  # rows: 18, 6, 24, 6
# Tolerance. In fp32 a step adds up in another order; 6 steps enlarge a difference of 1e-7 to at most this.
CLOSE = {"float32": 2e-6, "bfloat16": 4e-3}
TORTURE = bool(os.environ.get("LOSSCURVE_TORTURE"))
SIZES, KINDS = (1, 2, 4), ("ddp", "fsdp")
# of a world of four, whose processes share two cores, bfloat16 is in make torture
DTYPES = {size: tuple(CLOSE) if TORTURE or size < 4 else ("float32",) for size in (0, *SIZES)}
EVALUATIONS = [(16 * 128 * 5 + 8, 10**6), (16 * 128 * 2 + 1, 10**6), (40, 10**6), (2, 10**6), (10**5, 16 * 128 * 3)]


# (saved by, resumed by): some of the 49 pairs; make torture tests all.
PAIRS = [((2, "ddp"), (0, "ddp")), ((0, "ddp"), (2, "fsdp")), ((4, "fsdp"), (2, "ddp")), ((1, "fsdp"), (4, "ddp"))]
PAIRS += [((2, "fsdp"), (2, "fsdp")), ((4, "ddp"), (4, "ddp"))]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with token files."""
    place = tmp_path_factory.mktemp("ranks")
    (place / "text.txt").write_text(words(900), encoding="utf-8")
    prepare((str(place / "text.txt"),), place / "data", "char")
    return place


def settings(place, name, **more):
    return RUN | {"data_dir": str(place / "data"), "out_dir": str(place / name)} | more


def jobs_of(place, size):
    """Return the jobs of a world of `size` by name; size 0 is one process without torchrun."""
    jobs = {}
    taught = {"teacher": 2 * [str(place / "first")]}  # whose predictions rank 0 reads for all
    for dtype in DTYPES[size]:
        for kind in KINDS if size else KINDS[:1]:
            name = f"{size} {kind} {dtype}"
            more = {"parallel": kind, "dtype": dtype}
            jobs[f"{kind} {dtype}"] = job(rank_jobs.train, settings=settings(place, name, **more))
            begin = settings(place, f"{name} evaluated", init_from=str(place / "first"), **more)
            jobs[f"{kind} {dtype} evaluated"] = job(rank_jobs.evaluate_first_weights, settings=begin, cases=EVALUATIONS)
    if size == 0:
        jobs["ddp muon"] = job(rank_jobs.train, settings=settings(place, "muon", **MUON | taught))
    for kind in KINDS if size in (0, 2) else ():
        if size or kind == "ddp":
            # without samples and an average, only the save itself has fsdp free its gathered root
            bare = {"parallel": kind, "ema": 0.0, "sample_tokens": 0}
            two = settings(place, f"{size} {kind} two", **TWO | taught | bare)
            jobs[f"{kind} two"] = job(rank_jobs.train, settings=two)
            llama = settings(place, f"{size} {kind} llama", **LLAMA | taught | {"parallel": kind})
            jobs[f"{kind} llama"] = job(rank_jobs.train, settings=llama)
    if size == 2:
        for kind in KINDS:
            again = settings(place, f"{kind} again", parallel=kind, activation_checkpointing=True)
            jobs[f"{kind} again"] = job(rank_jobs.train, settings=again)
            muon = settings(place, f"{kind} muon", **MUON | taught | {"parallel": kind})
            jobs[f"{kind} muon"] = job(rank_jobs.train, settings=muon)
        offload = settings(place, "offload", parallel="fsdp", cpu_offload=True)
        jobs["offload"] = job(rank_jobs.train, settings=offload)
    return jobs


@pytest.fixture(scope="module")
def outcomes(place):
    """Return what each rank returned, by size of the world and name of the job."""
    first = settings(place, "first", dropout=0.0)
    require_values(run_job(0, job(rank_jobs.train, settings=first), place / "outcomes of first"))
    found = {}
    for size in (0, *SIZES):
        jobs = jobs_of(place, size)
        done = run_world(size, list(jobs.values()), place / f"outcomes {size}")
        found[size] = {name: require_values(of) for name, of in zip(jobs, done, strict=True)}
    return found


def batches_by_step(outcomes, name):
    """Return, for each step, what all ranks saw under `name`, joined by rank: one row per window."""
    per_step = len(outcomes[0]["seen"][name]) // len(outcomes[0]["losses"])
    return [
        torch.cat([torch.cat(one["seen"][name][at : at + per_step]) for one in outcomes])
        for at in range(0, len(outcomes[0]["seen"][name]), per_step)
    ]


def plain_loop(config, tokens, steps):
    """Train on the whole batch at once in plain PyTorch; return losses, gradient norms and weights."""
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


def largest_difference(a, b):
    """Return the largest difference between two sets of weights."""
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def all_runs(outcomes):
    for size in (0, *SIZES):
        for kind in KINDS if size else KINDS[:1]:
            for dtype in DTYPES[size]:
                yield size, kind, dtype, outcomes[size][f"{kind} {dtype}"]


def test_same_windows_in_the_same_order_and_same_dropout(place, outcomes):
    config = run_config(place / "0 ddp float32")
    tokens = open_data(place / "data", 16).train
    alone = outcomes[0]["ddp float32"]
    drawn = [name for name in alone[0]["seen"] if name.startswith("dropout")]
    assert len(drawn) == 1 + 3 * config.model.n_layer
    for size, kind, dtype, ours in all_runs(outcomes):
        per_rank = {name: batches_by_step(ours, name) for name in ("x", "y", "seeds")}
        assert len(per_rank["x"]) == STEPS
        for step in range(STEPS):
            batch = batch_at(tokens, config.seed, step, 16, 16)
            for name, seen in per_rank.items():
                assert np.array_equal(seen[step].numpy(), getattr(batch, name)), (size, kind, dtype, step, name)
        for name in drawn if dtype == "float32" else ():  # in bfloat16 an attention score may round to zero
            for step, (a, b) in enumerate(zip(batches_by_step(ours, name), batches_by_step(alone, name), strict=True)):
                assert torch.equal(a, b), (size, kind, name, step)
    shares = [len(outcomes[size]["ddp float32"][0]["seen"]["x"]) // STEPS for size in SIZES]
    assert shares == [4, 2, 1]  # micro-batches of a process


def test_losses_norms_and_weights_equal_a_plain_loop(place, outcomes):
    config = run_config(place / "0 ddp float32")
    losses, norms, weights = plain_loop(config, open_data(place / "data", 16).train, STEPS)
    assert max(norms) > config.grad_clip  # clipping is active
    for size, kind, dtype, ours in all_runs(outcomes):
        close, what = CLOSE[dtype] * 5, (size, kind, dtype)
        for one in ours:
            assert one["losses"] == pytest.approx(losses, abs=close), what
            assert one["norms"] == pytest.approx(norms, rel=close * 5), what
            assert largest_difference(one["weights"], weights) < close, what


def test_any_number_of_processes_and_ddp_or_fsdp_give_the_same_run(place, outcomes):
    """Compare weights and metrics with one process without torchrun, in the same precision."""
    for size, kind, dtype, ours in all_runs(outcomes):
        alone, what = outcomes[0][f"ddp {dtype}"][0], (size, kind, dtype)
        for one in ours:
            assert largest_difference(one["weights"], alone["weights"]) <= (0 if size == 0 else CLOSE[dtype]), what
            assert largest_difference(one["weights"], ours[0]["weights"]) == 0, what
            assert one["losses"] == ours[0]["losses"], what
        rows, expected = (read_record(place / f"{n} {k} {dtype}") for n, k in ((size, kind), (0, "ddp")))
        assert [(row["step"], row["split"], row["lr"]) for row in rows] == [
            (row["step"], row["split"], row["lr"]) for row in expected
        ]
        for row, other in zip(rows, expected, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], abs=CLOSE[dtype]), what
            assert row["tokens"] == other["tokens"]
            if row["split"] == "val":
                assert row["val_loss_ema"] == pytest.approx(other["val_loss_ema"], abs=CLOSE[dtype]), what
                assert row["step"] == 0 or row["val_loss_ema"] != row["loss"], what
            if row.get("grad_norm"):
                assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=CLOSE[dtype] * 10), what
        assert sum(row["split"] == "val" for row in rows) == 3


@pytest.mark.parametrize("model", ["two", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_two_micro_batches_bit_for_bit(outcomes, kind, model):
    """The mean of two numbers does not depend on their order."""
    alone, two = outcomes[0][f"ddp {model}"][0], outcomes[2][f"{kind} {model}"]
    for one in two:
        assert one["losses"] == alone["losses"]
        assert largest_difference(one["weights"], alone["weights"]) == 0


@pytest.mark.parametrize("dtype", CLOSE)
def test_evaluation_is_bit_for_bit_the_same_for_any_number_of_processes(outcomes, dtype):
    expected = outcomes[0][f"ddp {dtype} evaluated"][0]
    assert [tokens for _, _, tokens in expected] == [*(count - 1 for count, _ in EVALUATIONS[:-1]), 16 * 128 * 3]
    assert len({loss for loss, _, _ in expected}) == len(EVALUATIONS)
    for size in (size for size in SIZES if dtype in DTYPES[size]):
        for kind in KINDS:
            found = outcomes[size][f"{kind} {dtype} evaluated"]
            if (kind, dtype) != ("fsdp", "bfloat16"):
                assert found == [expected] * size, (size, kind)
                continue
            # on a CPU its blocks are not fused, so they round otherwise than those of one process without FSDP
            assert found == [outcomes[1][f"fsdp {dtype} evaluated"][0]] * size, size
            for (loss, _, tokens), (other, _, expected_tokens) in zip(found[0], expected, strict=True):
                assert tokens == expected_tokens
                assert loss == pytest.approx(other, abs=CLOSE[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_nothing(outcomes, kind):
    """Bit for bit, with dropout."""
    recomputed, kept = outcomes[2][f"{kind} again"][0], outcomes[2][f"{kind} float32"][0]
    assert recomputed["losses"] == kept["losses"]
    assert largest_difference(recomputed["weights"], kept["weights"]) == 0
    assert len(recomputed["seen"]["dropout 2"]) == 2 * len(kept["seen"]["dropout 2"])  # the activations were recomputed


def test_cpu_offload_changes_nothing(outcomes):
    offloaded, kept = outcomes[2]["offload"][0]["weights"], outcomes[2]["fsdp float32"][0]["weights"]
    assert largest_difference(offloaded, kept) <= CLOSE["float32"]


def test_the_files_of_a_run_equal_those_of_one_process(place, outcomes):
    one = torch.load(place / "0 ddp float32/model.pt", weights_only=True)
    for size, kind, dtype, ours in all_runs(outcomes):
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
def resumed_runs(place, outcomes):
    """Return what each rank returned of a resumed run, by (world that saved it, world that resumed it)."""
    found = {}
    for size in (0, *SIZES):
        jobs = {}
        for source in [(0, "ddp"), *((n, kind) for n in SIZES for kind in KINDS)]:
            for kind in KINDS if size else KINDS[:1]:
                if not TORTURE and (source, (size, kind)) not in PAIRS:
                    continue
                folder = place / f"{source[0]} {source[1]} resumed by {size} {kind}"
                shutil.copytree(place / f"{source[0]} {source[1]} float32", folder)
                shutil.rmtree(folder / f"step-{STEPS:06d}")  # as if it had been killed before its last checkpoint
                changes = {"out_dir": str(folder), "parallel": kind}
                jobs[source, (size, kind)] = job(rank_jobs.train, settings=changes, resume=True)
        done = run_world(size, list(jobs.values()), place / f"outcomes of resumes by {size}")
        found |= {pair: require_values(of) for pair, of in zip(jobs, done, strict=True)}
    return found


def test_a_run_saved_by_any_world_is_resumed_by_any_other(place, outcomes, resumed_runs, record_property):
    """The checkpoint comes back with its moments, the next batch follows, the losses equal an undisturbed run's."""
    tokens, whole = open_data(place / "data", 16).train, outcomes[0]["ddp float32"][0]
    config = run_config(place / "0 ddp float32")
    rows = read_record(place / "0 ddp float32")
    assert len(resumed_runs) == (7 * 7 if TORTURE else len(PAIRS))
    for (source, target), ours in resumed_runs.items():
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
            assert largest_difference(one["weights"], whole["weights"]) <= CLOSE["float32"], (source, target)
        for step, x in enumerate(batches_by_step(ours, "x"), STATE):
            assert np.array_equal(x.numpy(), batch_at(tokens, config.seed, step, 16, 16).x), (source, target, step)
        again = read_record(place / f"{source[0]} {source[1]} resumed by {target[0]} {target[1]}")
        assert [(row["step"], row["split"]) for row in again] == [(row["step"], row["split"]) for row in rows]
        if source[0] == target[0] and source[1] == target[1]:  # the same arithmetic, so bit for bit
            undisturbed = outcomes[source[0]][f"{source[1]} float32"][0]
            assert largest_difference(ours[0]["weights"], undisturbed["weights"]) == 0, (source, target)
    record_property("saved by N, resumed by M", len(resumed_runs))


@pytest.fixture(scope="module")
def resumed_muon_runs(place, outcomes):
    """Return what each rank of 4 returned of a resumed run with Muon that 2 saved, by the two kinds."""
    jobs = {}
    for source, target in (("ddp", "fsdp"), ("fsdp", "ddp")):
        folder = place / f"{source} muon resumed by {target}"
        shutil.copytree(place / f"{source} muon", folder)
        shutil.rmtree(folder / f"step-{STEPS:06d}")
        jobs[source, target] = job(rank_jobs.train, settings={"out_dir": str(folder), "parallel": target}, resume=True)
    done = run_world(4, list(jobs.values()), place / "outcomes of muon")
    return {pair: require_values(of) for pair, of in zip(jobs, done, strict=True)}


def test_muon_on_several_processes_is_muon_on_one(place, outcomes, resumed_muon_runs):
    """A matrix is orthogonalised whole, though its rows are sharded, in shards of unequal sizes or none."""
    [alone] = outcomes[0]["ddp muon"]
    ours = {kind: outcomes[2][f"{kind} muon"] for kind in KINDS} | resumed_muon_runs
    for what, ranks in ours.items():
        for one in ranks:
            losses = alone["losses"][-len(one["losses"]) :]
            assert one["losses"] == pytest.approx(losses, abs=CLOSE["float32"]), what
            assert largest_difference(one["weights"], alone["weights"]) < CLOSE["float32"], what
            assert largest_difference(one["weights"], ranks[0]["weights"]) == 0, what
    for (source, _), ranks in resumed_muon_runs.items():
        saved, _ = checkpoint.load_state(place / f"{source} muon" / f"step-{STATE:06d}")
        for name, value in saved["optimizer"].items():
            assert torch.equal(ranks[0]["start"][0]["optimizer"][name], value), name
        assert saved["optimizer"]["momentum.h.1.attn.c_attn.weight"].abs().max() > 0
