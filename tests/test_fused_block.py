"""Blocks as one function and as plain operations, both in bfloat16, against float64."""

import pytest
import torch

from llm.arch import make_model
from llm.config import GPTConfig
from llm.machine.device import precision
from llm.machine.fused_block import call
from llm.machine.kernel import find_compiler
from llm.machine.parallel import recompute_activations

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="needs a C compiler")
LLAMAS = [
    {"block_size": 24, "n_head": 4, "n_embd": 128},  # heads of 32
    {"block_size": 33, "n_head": 4, "n_embd": 256, "n_kv_head": 2},  # heads of 64, and positions beyond whole vectors
    {"block_size": 7, "n_head": 6, "n_embd": 60, "n_kv_head": 1, "qk_norm": False, "ffn_dim": 37},
    {"block_size": 2, "n_head": 3, "n_embd": 24},
    {"block_size": 40, "n_head": 4, "n_embd": 128, "n_kv_head": 2, "dropout": 0.3},
]
GPTS = [
    {"block_size": 24, "n_head": 4, "n_embd": 128},
    {"block_size": 33, "n_head": 4, "n_embd": 256, "gelu": "tanh", "bias": True},
    {"block_size": 7, "n_head": 6, "n_embd": 60, "ffn_mult": 3, "bias": True},
    {"block_size": 2, "n_head": 3, "n_embd": 24, "gelu": "tanh"},
    {"block_size": 40, "n_head": 4, "n_embd": 128, "dropout": 0.3, "bias": True},
    {"block_size": 40, "n_head": 4, "n_embd": 128, "dropout": 0.3, "gelu": "tanh"},
]
CASES = [{"arch": "llama", **case} for case in LLAMAS] + [{"arch": "gpt2", **case} for case in GPTS]
ONE_OF_EACH = pytest.mark.parametrize("case", [CASES[0], CASES[len(LLAMAS)]], ids=["llama", "gpt2"])


def model_of(case):
    torch.manual_seed(1)
    model = make_model(GPTConfig(vocab_size=97, n_layer=2, **case))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model, torch.randint(97, (5, model.config.block_size))


def states_and_gradients(model, ids):
    model.zero_grad()
    hidden = model.hidden(ids, seeds=torch.arange(len(ids), dtype=torch.int32))
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"states": hidden.detach().double()}


def in_bfloat16(model, ids, monkeypatch, fused):
    with monkeypatch.context() as patch, precision(torch.bfloat16, torch.device("cpu")):
        patch.setattr(type(model.h[0]), "may_fuse", fused)
        return states_and_gradients(model, ids)


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=str)
def test_states_and_all_gradients_are_as_near_to_float64_as_those_of_plain_operations(case, monkeypatch):
    model, ids = model_of(case)
    plain, fused = (in_bfloat16(model, ids, monkeypatch, fused) for fused in (False, True))
    exact = states_and_gradients(model.double(), ids)
    assert fused.keys() == plain.keys() == exact.keys()
    for name, value in exact.items():
        of_plain, of_fused = ((found[name] - value).norm() / value.norm() for found in (plain, fused))
        assert of_fused < 1.5 * of_plain + 1e-3, name
        assert of_fused < 0.1, name
    assert any(not torch.equal(plain[name], fused[name]) for name in plain)  # they were two ways


@needs_compiler
def test_numbers_are_rounded_as_pytorch_rounds_them():
    x = torch.randn(10_000) * torch.logspace(-30, 30, 10_000)
    x[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1 + 2**-8])  # the last lies in the middle: ties to even
    y = torch.empty_like(x, dtype=torch.bfloat16)
    call("round_all", x, y, x.numel())
    assert torch.equal(y.view(torch.int16)[3:], x.bfloat16().view(torch.int16)[3:])
    assert torch.equal(y.isfinite(), x.isfinite())


@needs_compiler
@ONE_OF_EACH
def test_it_is_the_same_for_any_number_of_threads(case, monkeypatch):
    model, ids = model_of(case)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(in_bfloat16(model, ids, monkeypatch, True))
    torch.set_num_threads(threads)
    vectors = [name for name, p in model.h.named_parameters("h") if p.dim() == 1]
    assert len(vectors) == (8 if case["arch"] == "llama" else 12)
    assert all(torch.equal(found[0][name], found[1][name]) for name in vectors)


@needs_compiler
@ONE_OF_EACH
def test_recomputed_activations_change_nothing(case, monkeypatch):
    model, ids = model_of({**case, "dropout": 0.3})
    expected = in_bfloat16(model, ids, monkeypatch, True)
    recompute_activations(model)
    found = in_bfloat16(model, ids, monkeypatch, True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@needs_compiler
@ONE_OF_EACH
def test_a_number_that_is_not_finite_stays_so(case, monkeypatch):
    """A training step refuses such a batch, so it must not vanish on the way."""
    for bad in (torch.nan, torch.inf):
        for name in ("h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight", "h.1.ln_2.weight"):
            model, ids = model_of(case)
            model.get_parameter(name).data.view(-1)[0] = bad
            assert not in_bfloat16(model, ids, monkeypatch, True)["states"].isfinite().all(), (bad, name)


@ONE_OF_EACH
def test_without_a_compiler_plain_operations_take_its_place(case, monkeypatch):
    model, ids = model_of(case)
    expected = in_bfloat16(model, ids, monkeypatch, False)
    monkeypatch.setattr("llm.machine.kernel.load_block_kernel", lambda file: None)
    found = in_bfloat16(model, ids, monkeypatch, True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
