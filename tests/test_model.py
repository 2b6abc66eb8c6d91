"""The model against the transformers package's GPT-2, and its contract."""

import math

import pytest
import torch

from llm import GPT, GPTConfig
from llm.config.counts import flops_per_token
from llm.errors import UserError
from llm.model import Dropout, KVCache

SMALL = {"vocab_size": 97, "block_size": 16, "n_layer": 3, "n_head": 2, "n_embd": 24}


def test_the_default_is_the_chapters():
    model = GPT(GPTConfig())
    assert sum(p.numel() for p in model.parameters()) == 13_665_280
    config = model.config
    assert (config.vocab_size, config.block_size, config.n_layer) == (50257, 64, 4)
    assert (config.n_head, config.n_embd, config.ffn_mult) == (4, 128, 4)
    assert (config.dropout, config.bias, config.tied_lm_head, config.gelu) == (0.0, False, False, "exact")
    names = dict(model.named_parameters())
    assert {"wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.3.mlp.c_proj.bias", "ln_f.bias"} <= set(names)
    assert "h.0.attn.c_attn.bias" not in names
    assert "lm_head.bias" not in names


def test_loss_before_training_is_that_of_guessing():
    torch.manual_seed(0)
    ids = torch.randint(50257, (4, 65))
    logits, nothing = GPT(GPTConfig())(ids[:, :-1])
    assert nothing is None
    assert logits.shape == (4, 64, 50257)
    _, loss = GPT(GPTConfig())(ids[:, :-1], ids[:, 1:])
    assert abs(loss.item() - math.log(50257)) < 0.1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_logits_and_gradients_are_those_of_transformers(tied, bias, gelu):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = GPTConfig(**SMALL, tied_lm_head=tied, bias=bias, gelu=gelu)
    ours = GPT(config)
    for p in ours.parameters():  # away from the initialisation, where biases are 0 and norms 1
        p.data += 0.1 * torch.randn_like(p)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=97,
            n_positions=16,
            n_layer=3,
            n_head=2,
            n_embd=24,
            activation_function="gelu" if gelu == "exact" else "gelu_new",
            tie_word_embeddings=tied,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    mapped = {}
    for name, p in ours.state_dict().items():
        linear = name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and name.endswith("weight")
        mapped[name if name == "lm_head.weight" else f"transformer.{name}"] = p.t() if linear else p
    for name, p in theirs.state_dict().items():
        if name not in mapped:  # the attention biases that ours leaves out
            assert name.endswith(("c_attn.bias", "attn.c_proj.bias"))
            assert not bias
            mapped[name] = torch.zeros_like(p)
    theirs.load_state_dict(mapped)
    ids = torch.randint(97, (3, 17))
    x, y = ids[:, :-1], ids[:, 1:]
    expected = theirs(x).logits
    assert torch.allclose(ours(x)[0], expected, atol=1e-5)
    loss = ours(x, y)[1]
    loss.backward()
    torch.nn.functional.cross_entropy(expected.reshape(-1, 97), y.reshape(-1)).backward()
    gradients = {name.removeprefix("transformer."): p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        found = p.grad.t() if gradients[name].shape != p.grad.shape else p.grad
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            found = p.grad.t()
        assert torch.allclose(found, gradients[name], atol=1e-5), name


def test_no_position_sees_a_later_token():
    torch.manual_seed(2)
    model = GPT(GPTConfig(**SMALL)).eval()
    ids = torch.randint(97, (1, 16))
    changed = ids.clone()
    changed[0, 9] = (ids[0, 9] + 1) % 97
    before, after = model(ids)[0], model(changed)[0]
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_a_cache_gives_the_logits_of_the_whole_context():
    torch.manual_seed(3)
    model = GPT(GPTConfig(**SMALL)).eval()
    ids = torch.randint(97, (2, 16))
    cache = KVCache(model.config, 2, ids.device, torch.float32)
    parts = [model.lm_head(model.hidden(ids[:, a:b], cache)) for a, b in [(0, 5), (5, 6), (6, 7), (7, 12), (12, 16)]]
    assert torch.allclose(torch.cat(parts, 1), model(ids)[0], atol=1e-5)


def test_too_long_a_context_is_refused():
    with pytest.raises(UserError, match="17 tokens do not fit block_size = 16"):
        GPT(GPTConfig(**SMALL))(torch.zeros(1, 17, dtype=torch.int64))


def test_dropout_drops_its_share_and_keeps_the_mean():
    drop = Dropout(0.3, torch.arange(8, dtype=torch.int32))
    y = drop(torch.ones(8, 50, 100))
    assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)
    assert (drop(torch.ones(8, 50, 100)) == 0).ne(y == 0).float().mean().item() == pytest.approx(0.42, abs=0.02)
    for axis in (1, 2):  # neither rows nor columns share a draw
        assert (y == 0).float().mean(axis).std() < 0.08


def test_dropout_belongs_to_the_window():
    """A window drops the same whichever batch it stands in; other seeds drop others."""
    torch.manual_seed(4)
    model = GPT(GPTConfig(**SMALL, dropout=0.5)).train()
    ids, seeds = torch.randint(97, (4, 16)), torch.tensor([5, 6, 7, 8], dtype=torch.int32)
    whole = model.hidden(ids, seeds=seeds)
    parts = torch.cat([model.hidden(ids[i : i + 1], seeds=seeds[i : i + 1]) for i in range(4)])
    assert torch.allclose(whole, parts, atol=1e-5)
    assert not torch.allclose(whole, model.hidden(ids, seeds=seeds + 1), atol=1e-2)


def test_dropout_without_seeds_follows_torchs_generator():
    model = GPT(GPTConfig(**SMALL, dropout=0.5)).train()
    ids = torch.randint(97, (2, 16))
    torch.manual_seed(5)
    first = model.hidden(ids)
    assert not torch.equal(first, model.hidden(ids))
    torch.manual_seed(5)
    assert torch.equal(first, model.hidden(ids))
    assert torch.equal(model.eval().hidden(ids), model.hidden(ids))


def test_flops_are_those_that_pytorch_counts():
    """Its counter has no attention of fused kernels and no causal saving, so: written out, and counted whole."""
    from torch.utils.flop_counter import FlopCounterMode

    config = GPTConfig(**SMALL | {"dropout": 0.1})
    model = GPT(config)
    x = torch.zeros(3, config.block_size, dtype=torch.int64)
    with FlopCounterMode(display=False) as counted:
        logits, _ = model(x)
        logits.sum().backward()
    assert counted.get_total_flops() == pytest.approx(flops_per_token(model.config) * x.numel(), rel=0.01)
