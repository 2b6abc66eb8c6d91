"""Parameters and FLOPs that are counted from the settings are those of the model."""

import pytest
import torch

from llm.arch import make_model
from llm.config import GPTConfig
from llm.config.counts import (
    count_attention_parameters,
    count_feed_forward_parameters,
    count_parameters,
    count_parameters_by_part,
    flops_per_token,
    matrix_shapes,
    muon_flops,
)
from llm.muon import hidden_matrices, orthogonalize_all

SHAPES = (
    {},
    {"vocab_size": 50, "n_embd": 16},
    {"vocab_size": 50, "n_embd": 16, "bias": True, "tied_lm_head": True, "ffn_mult": 3},
    {"n_layer": 3, "n_embd": 24, "n_head": 3, "vocab_size": 70, "block_size": 9},
    {"n_layer": 3, "n_embd": 96, "bias": True, "ffn_mult": 3, "block_size": 17},
    {"tied_lm_head": True, "vocab_size": 301, "n_layer": 1},
    {"arch": "llama", "vocab_size": 50, "n_embd": 32, "n_kv_head": 2},
    {"arch": "llama", "vocab_size": 70, "n_layer": 3, "ffn_dim": 40, "qk_norm": False, "tied_lm_head": True},
    {"arch": "llama", "vocab_size": 50, "n_embd": 24, "n_head": 4, "n_kv_head": 2, "head_dim": 10},
)


def model_of(config):
    with torch.device("meta"):
        return make_model(config)


def size(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_those_of_the_model(shape):
    config = GPTConfig(**shape)
    model = model_of(config)
    assert count_parameters(config) == size(model)
    assert count_attention_parameters(config) == size(model.h[0].attn)
    assert count_feed_forward_parameters(config) == size(model.h[0].mlp)
    assert count_parameters_by_part(config) == {
        "embedding": size(model.wte),
        "positions": size(model.wpe) if config.arch == "gpt2" else 0,
        "blocks": size(model.h) + size(model.ln_f),
        "head": 0 if config.tied_lm_head else size(model.lm_head),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_are_six_a_weight_and_twelve_a_channel_and_position(shape):
    """A test of the model compares them with PyTorch's counter."""
    config = GPTConfig(**shape)
    model = model_of(config)
    weights = sum(p.numel() for p in model.h.parameters() if p.dim() == 2) + model.lm_head.weight.numel()
    expected = 6 * weights + 12 * config.n_layer * config.n_head * config.head_size * config.block_size
    assert flops_per_token(config) == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_and_the_work_of_muon_are_those_of_its_own_code(shape):
    from torch.utils.flop_counter import FlopCounterMode

    config = GPTConfig(**shape)
    found = hidden_matrices(model_of(config))
    matrices = [piece for p, rows in found.items() for piece in p.detach().split(rows)]
    assert sorted(map(tuple, (m.shape for m in matrices))) == sorted(config.n_layer * matrix_shapes(config))
    with FlopCounterMode(display=False) as counted:
        orthogonalize_all(matrices)
    assert muon_flops(config) == counted.get_total_flops()
