"""Muon against PyTorch's, its iteration in closed form, its state, and the settings that belong to it."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import config_for, steps_in, trained
from safetensors.torch import load_file
from torch import nn

from llm.config import GPTConfig, TrainConfig, from_settings, over_preset, to_settings
from llm.errors import UserError
from llm.model import GPT
from llm.muon import COEFFICIENTS, MARGIN, Muon, balanced, hidden_matrices, orthogonalize, orthogonalize_all
from llm.optim import AdamW, make_optimizer
from llm.plan import arithmetic
from llm.record.verdicts import gentler_flags
from llm.schedule import lr_at, muon_momentum_at
from llm.start.new_run import new_run
from llm.start.resume_run import resume_run
from llm.train import train, train_step
from llm.training.state import optimizer_tensors, restore_optimizer

SHAPES = {"square": (12, 12), "tall": (24, 8), "wide": (6, 20), "twin of wide": (20, 6)}
MUON = TrainConfig(optimizer="muon", weight_decay=0.3, max_steps=100)


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def muon_for(shapes, rows=None, dtype=torch.float32, **group):
    """Return parameters of these shapes, and a Muon for them (beside an AdamW for one other)."""
    parameters = [nn.Parameter(drawn(number, *shape)) for number, shape in enumerate(shapes)]
    stacked = rows or [[shape[0]] for shape in shapes]
    adamw = torch.optim.AdamW([nn.Parameter(torch.zeros(3))], fused=True)
    group = {"lr": 0.1, "weight_decay": 0.3, "muon_momentum": 0.9} | group
    return parameters, Muon(adamw, dict(zip(parameters, stacked, strict=True)), group, dtype)


def small(**changes):
    torch.manual_seed(0)
    shape = {"vocab_size": 23, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 8}
    return GPT(GPTConfig(**shape | changes))


def give_gradients(parameters, step):
    for number, p in enumerate(parameters):
        p.grad = drawn(1000 * (step + 1) + number, *p.shape)


def everything(model, optimizer):
    tensors = dict(model.named_parameters()) | optimizer_tensors(model, optimizer)
    return {name: value.detach().clone() for name, value in tensors.items()}


# ---- the iteration


JORDAN = (3.4445, -4.7750, 2.0315)  # the coefficients of all five of his iterations, and of PyTorch's


def polynomial(s):
    s = s / MARGIN
    for a, b, c in COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 20), (1, 1, 5)])
def test_the_iteration_keeps_singular_vectors_and_maps_singular_values(shape):
    matrices = drawn(1, *shape).double()
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    expected = u @ torch.diag_embed(polynomial(s / s.square().sum(1, keepdim=True).sqrt())) @ vh
    assert torch.allclose(orthogonalize(matrices), expected, atol=1e-10)
    assert torch.allclose(orthogonalize(1e6 * matrices), expected, atol=1e-10)


def test_singular_values_end_in_the_stated_interval():
    s = polynomial(torch.linspace(0.0077, 1, 10**6, dtype=torch.float64))
    assert 0.63 < s.min() < 0.65
    assert 1.35 < s.max() < 1.37
    for dtype in (torch.float32, torch.bfloat16):
        matrices = drawn(2, 4, 16, 40).to(dtype)
        found = torch.linalg.svdvals(orthogonalize(matrices).float())
        assert 0.62 < found.min() < found.max() < 1.38, dtype  # bfloat16 has three digits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_of_one_direction_does_not_diverge(dtype):
    """Its singular value is its norm: the largest that there can be, and rounded."""
    matrices = drawn(4, 50, 16, 1) @ drawn(5, 50, 1, 40)
    found = torch.linalg.matrix_norm(orthogonalize(matrices.to(dtype)).float(), 2)
    assert 0.62 < found.min() < found.max() < 1.38


def test_a_matrix_of_zeros_stays_zero():
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))


def test_matrices_of_one_shape_or_its_transpose_are_one_batch(monkeypatch):
    batches = []
    monkeypatch.setattr("llm.muon.orthogonalize", lambda x: batches.append(tuple(x.shape)) or orthogonalize(x))
    matrices = [drawn(number, *shape) for number, shape in enumerate([(4, 8), (8, 4), (6, 6), (4, 8), (4, 4)])]
    found = orthogonalize_all(matrices)
    assert sorted(batches) == [(1, 4, 4), (1, 6, 6), (3, 4, 8)]
    for matrix, one in zip(matrices, found, strict=True):
        is_wide = matrix.size(0) < matrix.size(1)
        alone = balanced(orthogonalize(matrix[None] if is_wide else matrix.mT[None]))[0]
        assert one.shape == matrix.shape
        assert torch.allclose(one, alone if is_wide else alone.mT, atol=1e-5)
        lengths = one.norm(dim=0 if is_wide else 1)
        assert torch.allclose(lengths, lengths.mean().expand_as(lengths), rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_vectors_along_the_longer_side_get_one_length_and_nothing_else_changes(dtype, tolerance):
    matrices = drawn(3, 2, 4, 20).to(dtype)
    found = balanced(matrices)
    before, after = (x.double().square().sum((1, 2)) for x in (matrices, found))
    assert torch.allclose(before, after, rtol=tolerance)
    lengths = found.double().square().sum(1)
    assert torch.allclose(lengths, (after / 20)[:, None].expand_as(lengths), rtol=2 * tolerance)
    directions = [nn.functional.normalize(x.double(), dim=1) for x in (matrices, found)]
    assert torch.allclose(*directions, atol=tolerance)
    matrices[0, :, 3] = 0  # a neuron without a gradient
    assert balanced(matrices)[0, :, 3].tolist() == [0.0] * 4
    assert balanced(matrices).isfinite().all()


# ---- the update


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch before 2.9 has no Muon")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_updates_are_those_of_pytorchs_muon(dtype, tolerance, monkeypatch):
    """With its coefficients, and but for the lengths along the longer side, which it leaves as they are.

    Tolerance, of a change with singular values near lr: float32 rounds each iteration, and bfloat16 has 3 digits.
    """
    monkeypatch.setattr("llm.muon.balanced", lambda x: x)
    monkeypatch.setattr("llm.muon.COEFFICIENTS", 5 * (JORDAN,))
    monkeypatch.setattr("llm.muon.MARGIN", 1.0)
    if dtype == torch.float32:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # PyTorch's knows bfloat16 only
    parameters, ours = muon_for(SHAPES.values(), dtype=dtype)
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    theirs = torch.optim.Muon(twins, lr=0.1, weight_decay=0.3, momentum=0.9, adjust_lr_fn="original")
    for step in range(5):
        lr = 0.1 / (1 + step)
        ours.param_groups[-1]["lr"] = theirs.param_groups[0]["lr"] = lr
        give_gradients(parameters, step)
        give_gradients(twins, step)
        ours.step()
        theirs.step()
        for name, p, q in zip(SHAPES, parameters, twins, strict=True):
            assert (p - q).abs().max() < tolerance * 0.1, (name, step)


def test_the_learning_rate_is_the_size_of_an_update():
    parameters, optimizer = muon_for(SHAPES.values(), weight_decay=0.0, lr=0.01)
    before = [p.detach().clone() for p in parameters]
    give_gradients(parameters, 0)
    optimizer.step()
    for name, p, old in zip(SHAPES, parameters, before, strict=True):
        change = p.detach() - old
        spectral = 0.01 * math.sqrt(max(1, p.size(0) / p.size(1)))
        assert torch.linalg.matrix_norm(change, 2) == pytest.approx(spectral, rel=0.4), name
        assert change.square().mean().sqrt() == pytest.approx(0.01 / math.sqrt(p.size(1)), rel=0.25), name


@pytest.mark.parametrize("rows", [[8, 8, 8], [8, 4, 4], [6, 6]])
def test_stacked_matrices_are_updated_as_separate_ones(rows):
    """Queries, keys and values; fewer of keys and values than of queries; gate and up."""
    [fused], one = muon_for([(sum(rows), 8)], [rows])
    parts, many = muon_for([(count, 8) for count in rows])
    with torch.no_grad():
        fused.copy_(torch.cat(parts))
    for step in range(3):
        give_gradients(parts, step)
        fused.grad = torch.cat([p.grad for p in parts])
        one.step()
        many.step()
        assert torch.allclose(fused, torch.cat(parts), atol=1e-5)


def test_many_matrices_go_in_several_batches(monkeypatch):
    expected, optimizer = muon_for(SHAPES.values())
    monkeypatch.setattr("llm.muon.BATCH", 300)
    parameters, batched = muon_for(SHAPES.values())
    assert [len(batch) for batch in optimizer.batches] == [4]
    assert [len(batch) for batch in batched.batches] == [1, 1, 2]
    for one in (optimizer, batched):
        give_gradients(expected if one is optimizer else parameters, 0)
        one.step()
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(parameters, expected, strict=True))


# ---- which matrices


@pytest.mark.parametrize("tied", [False, True])
def test_muon_takes_the_matrices_of_the_blocks(tied):
    model = small(bias=True, tied_lm_head=tied)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: rows for p, rows in hidden_matrices(model).items()}
    expected = {"attn.c_attn": [8, 8, 8], "attn.c_proj": [8], "mlp.c_fc": [32], "mlp.c_proj": [8]}
    assert found == {f"h.{i}.{name}.weight": rows for i in range(2) for name, rows in expected.items()}
    for split in (False, True):
        optimizer = make_optimizer(model, replace(MUON, weight_decay_split=split))
        *others, muon = optimizer.param_groups
        assert {names[id(p)] for p in muon["params"]} == found.keys()
        assert {names[id(p)] for group in others for p in group["params"]} == set(names.values()) - found.keys()
        assert muon["weight_decay"] == 0.3
        spared = {names[id(p)] for p in others[-1]["params"]}
        assert [group["weight_decay"] for group in others] == ([0.3, 0.0] if split else [0.3])
        assert {"wte.weight", "ln_f.weight", "h.0.attn.c_attn.bias"} <= spared
        assert ("lm_head.weight" in spared) == (not split and not tied)


def test_fewer_keys_than_queries_and_a_gate_are_recognised():
    """A model with the names and the stacked projections of `GPT`, as a llama has them."""
    linears = {"attn.c_attn": (16 + 2 * 4, 16), "attn.c_proj": (16, 16), "mlp.c_fc": (2 * 40, 16)}
    shapes = linears | {"mlp.c_proj": (16, 40)}
    block = nn.ModuleDict({"attn": nn.ModuleDict(), "mlp": nn.ModuleDict(), "ln_1": nn.RMSNorm(16)})
    for name, (rows, columns) in shapes.items():
        layer, linear = name.split(".")
        block[layer][linear] = nn.Linear(columns, rows, bias=False)
    found = hidden_matrices(SimpleNamespace(h=nn.ModuleList([block])))
    assert list(found.values()) == [[16, 4, 4], [16], [40, 40], [16]]


def test_the_iteration_takes_the_precision_of_the_device_that_makes_it():
    """A parameter that is sharded over CUDA devices, whose shard cpu_offload keeps on the CPU."""
    p = nn.Parameter(drawn(0, 4, 4))
    p.device_mesh = SimpleNamespace(device_type="cuda")
    adamw = torch.optim.AdamW([nn.Parameter(torch.zeros(3))], fused=True)
    assert Muon(adamw, {p: [4]}, {"lr": 0.1}, torch.float32).dtype == torch.bfloat16
    assert muon_for([(4, 4)])[1].dtype == torch.float32
    assert muon_for([(4, 4)], dtype=torch.bfloat16)[1].dtype == torch.bfloat16


# ---- refused batches, and the state


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_refused_batch_changes_nothing(value):
    model = small()
    optimizer = make_optimizer(model, MUON)
    give_gradients(model.parameters(), 0)
    optimizer.step()
    before = everything(model, optimizer)
    give_gradients(model.parameters(), 1)
    for p in model.parameters():
        p.grad.view(-1)[1] = value
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(found, before[name]) for name, found in everything(model, optimizer).items())
    give_gradients(model.parameters(), 1)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert not any(torch.equal(found, before[name]) for name, found in everything(model, optimizer).items())


def test_the_gradient_scaler_skips_an_overflow():
    model = small()
    optimizer = make_optimizer(model, MUON)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    changed = []
    stepped = []
    optimizer.register_step_post_hook(lambda *_: stepped.append(optimizer.found_inf.item()))
    for step, spoiled in enumerate((False, True, False)):
        before = everything(model, optimizer)
        give_gradients(model.parameters(), step)
        for p in model.parameters():
            p.grad.mul_(math.inf if spoiled else scaler.get_scale())
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        after = everything(model, optimizer)
        changed.append({name: name not in before or not torch.equal(before[name], after[name]) for name in after})
    assert [set(found.values()) for found in changed] == [{True}, {False}, {True}]
    assert scaler.get_scale() == 2.0
    assert stepped == [0, 1, 0]  # the step is called and finds out on the device; the scaler does not wait for it


def test_a_restored_optimizer_goes_on_bit_for_bit():
    model, other = small(), small()
    first, second = make_optimizer(model, MUON), make_optimizer(other, MUON)
    for step in range(3):
        give_gradients(model.parameters(), step)
        first.step()
    tensors = {name: value.clone() for name, value in optimizer_tensors(model, first).items()}
    assert tensors["momentum.h.0.attn.c_attn.weight"].shape == (24, 8)
    muons = [name for name in tensors if name.startswith("momentum.")]
    moments = [name for name in tensors if name.startswith("exp_avg.")]
    assert (len(muons), len(moments)) == (8, len(list(model.parameters())) - 8)
    restore_optimizer(other, second, tensors)
    other.load_state_dict(model.state_dict())
    for step in range(3, 5):
        for one, optimizer in ((model, first), (other, second)):
            give_gradients(one.parameters(), step)
            optimizer.step()
    expected = everything(model, first)
    assert all(torch.equal(found, expected[name]) for name, found in everything(other, second).items())
    restore_optimizer(other, second, {})
    assert not any(value.any() for entry in second.state.values() for value in entry.values())
    with pytest.raises(UserError, match="belongs to another run"):
        restore_optimizer(small(), make_optimizer(small(), TrainConfig()), tensors)


# ---- a run


def test_the_state_of_adamw_alone_is_as_before():
    optimizer = make_optimizer(small(), TrainConfig())
    assert type(optimizer) is AdamW
    assert [group["lr_ratio"] for group in optimizer.param_groups] == [1.0]
    assert not {"muon_lr", "muon_momentum"} & to_settings(TrainConfig()).keys()


def test_rates_and_momentum_follow_the_step(here):
    config = config_for(here, optimizer="muon", muon_lr=0.05, max_steps=100)
    with new_run(config) as run:
        for step in (0, 1, 5, 10, 50):
            train_step(run.parts, step)
            adamw, muon = run.parts.optimizer.param_groups
            assert adamw["lr"] == lr_at(step, config)
            assert muon["lr"] == pytest.approx(lr_at(step, config) / config.max_lr * 0.05, rel=1e-12)
            assert muon["muon_momentum"] == pytest.approx(min(0.95, 0.85 + 0.1 * step / 10))


def test_the_momentum_warms_up():
    def warmed(**changes):
        config = TrainConfig(optimizer="muon", **changes)
        return [muon_momentum_at(step, config) for step in (0, 150, 300, 5000)]

    assert warmed() == pytest.approx([0.85, 0.90, 0.95, 0.95])  # 5,000 steps
    assert warmed(max_steps=10**6, muon_momentum=0.99) == pytest.approx([0.85, 0.92, 0.99, 0.99])
    assert warmed(max_steps=500) == pytest.approx([0.85, 0.95, 0.95, 0.95])  # 50 steps
    assert warmed(max_steps=9) == [0.95] * 4
    assert warmed(muon_momentum=0.5) == [0.5] * 4


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16", "dropout": 0.2, "activation_checkpointing": True}])
def test_a_run_learns_and_resumes_bit_for_bit(here, settings):
    settings = {"optimizer": "muon", "max_steps": 40, "eval_every": 20, "grad_clip": 1.0} | settings
    _, events = trained(config_for(here, out_dir="whole", **settings))
    losses = [step.loss.item() for step in steps_in(events)]
    assert losses[-1] < losses[0] - 0.5
    with new_run(config_for(here, out_dir="parts", **settings)) as run:
        run.stop = lambda: run.progress.step == 23
        list(train(run))
    with resume_run(Path("parts"), {}) as run:
        list(train(run))
    for name in ("model", "optimizer"):
        whole, parts = (load_file(Path(folder) / f"step-000040/{name}.safetensors") for folder in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert "momentum.h.1.mlp.c_fc.weight" in whole


# ---- settings and plan


@pytest.mark.parametrize(("name", "value"), [("muon_lr", 0.1), ("muon_momentum", 0.9)])
def test_settings_of_muon_need_muon(name, value):
    with pytest.raises(UserError) as caught:
        from_settings({name: value})
    assert str(caught.value) == (
        f"{name} = {value}: optimizer = 'adamw' does not use it; leave it out, or give --optimizer muon"
    )
    config = from_settings({name: value, "optimizer": "muon"})
    assert to_settings(config)[name] == value
    assert from_settings(to_settings(config)) == config


def test_adamw_over_a_preset_with_muon_drops_its_settings():
    lines = []
    preset = {"optimizer": "muon", "muon_lr": 0.1, "muon_momentum": 0.9}
    assert over_preset(preset, {"optimizer": "adamw"}, lines.append) == TrainConfig()
    assert lines == [
        "muon_lr = 0.1, muon_momentum = 0.9 of the preset is ignored: it applies to optimizer = 'muon' only"
    ]
    assert over_preset(preset, {}, lines.append) == from_settings(preset)
    with pytest.raises(UserError, match=r"muon_lr = 0\.2"):  # the user's own
        over_preset(preset, {"optimizer": "adamw", "muon_lr": 0.2}, lines.append)


def test_the_plan_counts_the_state_of_the_optimizer():
    shape = {"vocab_size": 23, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 8, "bias": True}
    for name in ("adamw", "muon"):
        config = from_settings(shape | {"optimizer": name})
        model = small(bias=True)
        optimizer = make_optimizer(model, config)
        tensors = [value for entry in optimizer.state.values() for value in entry.values() if value.dim()]
        assert arithmetic.optimizer_bytes(config) == sum(value.nbytes for value in tensors)
        parameters = sum(p.nbytes for p in model.parameters())
        assert arithmetic.memory_for(config, True, 4)["optimizer state"] == arithmetic.optimizer_bytes(config)
        assert arithmetic.checkpoint_bytes(config) == parameters + arithmetic.optimizer_bytes(config)
        assert arithmetic.bytes_copied_to_save(config) == 2 * parameters + arithmetic.optimizer_bytes(config)


def test_the_remedies_name_both_learning_rates():
    assert gentler_flags(replace(MUON, grad_clip=1.0)) == "--max_lr 0.0001, --muon_lr 0.0067"
    assert gentler_flags(TrainConfig(grad_clip=1.0)) == "--max_lr 0.0001"
