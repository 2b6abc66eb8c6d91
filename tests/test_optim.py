"""AdamW against the update written out in fp64, its groups by hand, its state through a checkpoint."""

import copy

import pytest
import torch
from torch.torch_version import TorchVersion

from llm.config import GPTConfig, TrainConfig
from llm.errors import UserError
from llm.model import GPT
from llm.optim import clip_gradients, kernel_reads_found_inf, make_optimizer, parameter_groups
from llm.training.state import optimizer_tensors, restore_optimizer

SMALL = {"vocab_size": 23, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 8}


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**SMALL | changes))


def names(model, group):
    of = {id(p): name for name, p in model.named_parameters()}
    return {of[id(p)] for p in group["params"]}


def give_gradients(model, step):
    torch.manual_seed(100 + step)
    for p in model.parameters():
        p.grad = torch.randn_like(p)


def update(model, optimizer, steps):
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        give_gradients(model, step)
        optimizer.step()


def test_one_group_holds_everything():
    model = small()
    (group,) = parameter_groups(model, 0.3, split=False)
    assert names(model, group) == {name for name, _ in model.named_parameters()}
    assert group["weight_decay"] == 0.3


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_split_spares_norms_biases_and_embeddings(tied, bias):
    model = small(tied_lm_head=tied, bias=bias)
    decayed, plain = parameter_groups(model, 0.3, split=True)
    linears = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    expected = {f"h.{i}.{linear}" for i in range(2) for linear in linears} | (set() if tied else {"lm_head.weight"})
    assert names(model, decayed) == expected
    assert names(model, plain) == {name for name, _ in model.named_parameters()} - expected
    assert {"wte.weight", "wpe.weight", "ln_f.weight", "h.1.ln_2.bias", "h.0.mlp.c_fc.bias"} <= names(model, plain)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))  # each once


def test_the_recipe_reaches_the_optimizer():
    optimizer = make_optimizer(small(), TrainConfig())
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (3e-4, (0.9, 0.95), 0.01, 1e-8)
    config = TrainConfig(max_lr=0.1, beta1=0.5, beta2=0.6, weight_decay=0.2, weight_decay_split=True)
    groups = make_optimizer(small(), config).param_groups
    assert [(g["lr"], g["betas"], g["weight_decay"]) for g in groups] == [
        (0.1, (0.5, 0.6), 0.2),
        (0.1, (0.5, 0.6), 0.0),
    ]


def everything(model, optimizer):
    """Weights and moments, copied."""
    tensors = dict(model.named_parameters()) | {
        str(key): value for key, value in optimizer_tensors(model, optimizer).items()
    }
    return {name: value.detach().clone() for name, value in tensors.items()}


@pytest.fixture
def unread(monkeypatch):
    """A kernel that raises an error for `found_inf`, as that of MPS did before PyTorch 2.13."""
    kernel = torch._fused_adamw_

    def update_in_any_case(*lists, found_inf, **more):
        assert found_inf is None
        kernel(*lists, found_inf=None, **more)

    monkeypatch.setattr(torch, "_fused_adamw_", update_in_any_case)
    monkeypatch.setattr("llm.optim.kernel_reads_found_inf", lambda device: False)


@pytest.mark.parametrize("kernel", ["reads found_inf", "unread"])
def test_a_step_with_found_inf_changes_nothing(request, kernel):
    """What torch.optim.AdamW promises for its gradient scaler, and what a refused batch relies on."""
    if kernel == "unread":
        request.getfixturevalue(kernel)
    model = small()
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.3))
    update(model, optimizer, range(2))
    before = everything(model, optimizer)
    optimizer.found_inf = torch.ones(())
    update(model, optimizer, [2])
    assert all(torch.equal(value, before[name]) for name, value in everything(model, optimizer).items())
    optimizer.found_inf = torch.zeros(())
    update(model, optimizer, [2])
    assert not any(torch.equal(value, before[name]) for name, value in everything(model, optimizer).items())


def test_a_step_waits_for_found_inf_of_another_device():
    """With cpu_offload it is on CUDA, and the weights are on the CPU, whose kernel would read what is not there yet."""

    class OnCuda:
        device = torch.device("cuda:0")

        def to(self, device, non_blocking=False):
            assert device == torch.device("cpu")
            return torch.ones(()) if not non_blocking else torch.zeros(())

    model = small()
    optimizer = make_optimizer(model, TrainConfig())
    before = everything(model, optimizer)
    optimizer.found_inf = OnCuda()
    update(model, optimizer, [0])
    assert all(torch.equal(value, before[name]) for name, value in everything(model, optimizer).items())


@pytest.mark.parametrize(
    ("version", "device", "reads"),
    [("2.9.1", "mps", False), ("2.12.0", "mps", False), ("2.13.0", "mps", True), ("2.9.1", "cpu", True)],
)
def test_the_kernel_of_mps_reads_found_inf_in_new_versions(monkeypatch, version, device, reads):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    assert kernel_reads_found_inf(torch.device(device)) == reads


@pytest.mark.parametrize("share_of_norm", [0.0, 0.5, 1 - 1e-6, 1.0, 1 + 1e-6, 1e6])
def test_gradients_are_clipped_to_their_norm(share_of_norm):
    model, plain = small(), small()
    give_gradients(model, 0)
    give_gradients(plain, 0)
    grad_clip = share_of_norm * torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()]).item()
    norm = clip_gradients(model, grad_clip)
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), grad_clip or torch.inf)
    assert norm == pytest.approx(expected.item())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("split", [False, True])
def test_adamw_as_written(split):
    """Loshchilov & Hutter 2019, algorithm 2, in fp64: decay beside the gradient, with bias correction."""
    model = small()
    config = TrainConfig(beta1=0.8, beta2=0.9, weight_decay=0.5, weight_decay_split=split)
    optimizer = make_optimizer(model, config)
    spared = names(model, optimizer.param_groups[1]) if split else set()
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    mean = {name: torch.zeros_like(p) for name, p in expected.items()}
    square = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(5):
        update(model, optimizer, [step])
        lr = 1e-2 / (1 + step)
        for name, p in model.named_parameters():
            g = p.grad.double()
            mean[name] = 0.8 * mean[name] + 0.2 * g
            square[name] = 0.9 * square[name] + 0.1 * g * g
            m, v = mean[name] / (1 - 0.8 ** (step + 1)), square[name] / (1 - 0.9 ** (step + 1))
            decay = 0.0 if name in spared else 0.5
            expected[name] = expected[name] - lr * (m / (v.sqrt() + 1e-8) + decay * expected[name])
    for name, p in model.named_parameters():
        assert torch.allclose(p.double(), expected[name], rtol=1e-5, atol=1e-6), name
    tensors = optimizer_tensors(model, optimizer)
    for name in expected:
        assert torch.allclose(tensors[f"exp_avg.{name}"].double(), mean[name], rtol=1e-5, atol=1e-6)
        assert torch.allclose(tensors[f"exp_avg_sq.{name}"].double(), square[name], rtol=1e-5, atol=1e-6)
        assert tensors[f"step.{name}"].item() == 5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_a_restored_optimizer_goes_on_bit_for_bit(tied, split):
    config = TrainConfig(weight_decay_split=split)
    model = small(tied_lm_head=tied)
    optimizer = make_optimizer(model, config)
    update(model, optimizer, range(3))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    tensors = {key: value.clone() for key, value in optimizer_tensors(model, optimizer).items()}
    assert len(tensors) == 3 * len(weights)
    assert any(key.endswith(".lm_head.weight") for key in tensors) != tied
    update(model, optimizer, range(3, 6))
    other = small(seed=9, tied_lm_head=tied)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(weights[name])
    again = make_optimizer(other, config)
    given = {key: value.clone() for key, value in tensors.items()}
    restore_optimizer(other, again, given)
    update(other, again, range(3, 6))
    assert all(torch.equal(given[key], tensors[key]) for key in tensors)  # what was given is not written to
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
    found = optimizer_tensors(other, again)
    for key, value in optimizer_tensors(model, optimizer).items():
        assert torch.equal(found[key], value), key


def test_no_update_yet_is_no_state():
    model = small()
    optimizer = make_optimizer(model, TrainConfig())
    assert optimizer_tensors(model, optimizer) == {}
    update(model, optimizer, [0])
    assert optimizer_tensors(model, optimizer) != {}
    restore_optimizer(model, optimizer, {})  # back to before it
    assert all(not value.any() for entry in optimizer.state.values() for value in entry.values())


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("exp_avg_sq.wte.weight"),
        lambda tensors: tensors.update({"exp_avg.h.7.ln_1.weight": torch.zeros(8)}),
        lambda tensors: tensors.update({"exp_avg": torch.zeros(8)}),
        lambda tensors: tensors.update({"exp_avg.ln_f.bias": torch.zeros(9)}),
        lambda tensors: tensors.update({"exp_avg.ln_f.bias": torch.tensor(0.0)}),
        lambda tensors: tensors.update({"step.ln_f.bias": torch.zeros(8)}),
        lambda tensors: [tensors.pop(f"{kind}.wte.weight") for kind in ("exp_avg", "exp_avg_sq", "step")],
    ],
    ids=["one missing", "unknown", "no name", "shape", "scalar", "step", "all missing"],
)
def test_a_state_of_another_model_is_refused(change):
    model = small()
    optimizer = make_optimizer(model, TrainConfig())
    update(model, optimizer, [0])
    tensors = copy.deepcopy(optimizer_tensors(model, optimizer))
    change(tensors)
    with pytest.raises(UserError, match=r"checkpoint: .*another run"):
        restore_optimizer(model, make_optimizer(model, TrainConfig()), tensors)
