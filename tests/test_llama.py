"""The modern model against transformers' Llama and Qwen3, its cache, and what else a model has to do."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from conftest import flags

from llm.arch import make_model
from llm.checks.prove import fingerprint
from llm.config import GPTConfig, from_settings, over_preset, read_toml, to_settings
from llm.errors import UserError
from llm.generate import generate
from llm.llama import Llama, Rotation
from llm.machine.parallel import recompute_activations
from llm.model import KVCache
from llm.weights import read_weights

SHAPE = {"arch": "llama", "vocab_size": 97, "block_size": 16, "n_layer": 3, "n_head": 4, "n_embd": 32}
RENAMED = (
    ("ln_1", "input_layernorm"),
    ("ln_2", "post_attention_layernorm"),
    ("attn.c_proj", "self_attn.o_proj"),
    ("mlp.c_proj", "mlp.down_proj"),
    ("qk_norm.q", "self_attn.q_norm"),
    ("qk_norm.k", "self_attn.k_norm"),
    ("wte", "model.embed_tokens"),
    ("ln_f", "model.norm"),
)


def model_away_from_its_start(config):
    torch.manual_seed(1)
    model = Llama(config)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def in_their_names(tensors, config):
    """Return our tensors by transformers' names, with the joined matrices taken apart."""
    keys = config.kv_heads * config.head_size
    found = {}
    for name, tensor in tensors.items():
        for ours, theirs in RENAMED:
            name = name.replace(ours, theirs)
        name = f"model.layers.{name[2:]}" if name.startswith("h.") else name
        if "attn.c_attn" in name:
            parts = tensor.split([config.n_embd, keys, keys])
            found |= {
                name.replace("attn.c_attn", f"self_attn.{of}_proj"): part for of, part in zip("qkv", parts, strict=True)
            }
        elif "mlp.c_fc" in name:
            for of, part in zip(("gate", "up"), tensor.chunk(2), strict=True):
                found[name.replace("c_fc", f"{of}_proj")] = part
        else:
            found[name] = tensor
    return found


def theirs_with_our_weights(model):
    transformers = pytest.importorskip("transformers")
    config = model.config
    shape = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied_lm_head,
    }
    if config.qk_norm:
        theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape))
    else:
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    theirs.load_state_dict(in_their_names(model.state_dict(), config))
    return theirs


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    "more",
    [{}, {"n_kv_head": 2}, {"n_kv_head": 1, "tied_lm_head": True}, {"rope_theta": 500.0, "ffn_dim": 40}],
    ids=str,
)
def test_logits_loss_and_gradients_are_those_of_transformers(qk_norm, more):
    ours = model_away_from_its_start(GPTConfig(**SHAPE, **more, qk_norm=qk_norm))
    theirs = theirs_with_our_weights(ours)
    ids = torch.randint(97, (3, 17))
    x, y = ids[:, :-1], ids[:, 1:]
    expected = theirs(x).logits
    assert expected.std() > 0.1  # they are logits of something
    assert torch.allclose(ours(x)[0], expected, atol=1e-5)
    loss = ours(x, y)[1]
    expected_loss = torch.nn.functional.cross_entropy(expected.reshape(-1, 97), y.reshape(-1))
    assert abs(loss.item() - expected_loss.item()) < 1e-5
    loss.backward()
    expected_loss.backward()
    gradients = in_their_names({name: p.grad for name, p in ours.named_parameters()}, ours.config)
    for name, p in theirs.named_parameters():
        assert torch.allclose(gradients[name], p.grad, atol=1e-5), name


def test_a_query_times_a_key_depends_on_their_distance_only():
    torch.manual_seed(2)
    q, k = torch.randn(2, 1, 1, 1, 8)
    cpu = torch.device("cpu")

    def product(at, distance):
        turned_q, turned_k = (Rotation(p, 1, 8, 1e4, cpu)(x) for p, x in ((at, q), (at - distance, k)))
        return (turned_q * turned_k).sum().item()

    assert product(50, 3) == pytest.approx(product(7, 3), abs=1e-5)
    assert product(50, 3) != pytest.approx(product(50, 4), abs=1e-2)


def test_at_first_every_token_is_as_likely_and_every_block_adds_nothing():
    model = Llama(GPTConfig(**SHAPE))
    ids = torch.randint(97, (2, 17))
    assert model(ids[:, :-1], ids[:, 1:])[1].item() == pytest.approx(math.log(97), abs=1e-6)
    stream = model.wte(ids[:, :-1])
    assert torch.equal(model.hidden(ids[:, :-1]), model.ln_f(stream))


def test_a_cache_gives_the_logits_of_the_whole_context():
    model = model_away_from_its_start(GPTConfig(**SHAPE, n_kv_head=2)).eval()
    ids = torch.randint(97, (2, 16))
    cache = KVCache(model.config, 2, ids.device, torch.float32)
    parts = [model.lm_head(model.hidden(ids[:, a:b], cache)) for a, b in [(0, 5), (5, 6), (6, 7), (7, 12), (12, 16)]]
    assert torch.allclose(torch.cat(parts, 1), model(ids)[0], atol=1e-5)


def test_a_full_cache_goes_on_as_attention_to_the_last_tokens():
    """Past block_size, every position sees the block_size positions up to its own: transformers with such a mask."""
    model = model_away_from_its_start(GPTConfig(**SHAPE)).eval()
    theirs = theirs_with_our_weights(model).eval()
    ids = torch.randint(97, (1, 40))
    cache = KVCache(model.config, 1, ids.device, torch.float32)
    ours = torch.cat([model.lm_head(model.hidden(ids[:, i : i + 1], cache)) for i in range(40)], 1)
    distance = torch.arange(40)[:, None] - torch.arange(40)
    banded = torch.zeros(40, 40).masked_fill((distance < 0) | (distance >= 16), -math.inf)
    expected = theirs(ids, attention_mask=banded[None, None]).logits
    assert torch.allclose(ours, expected, atol=1e-4)
    assert not torch.allclose(ours[:, -1], model(ids[:, -16:])[0][:, -1], atol=1e-3)  # computed anew, it is another


def test_generating_past_the_context_is_one_position_of_work_a_token():
    model = model_away_from_its_start(GPTConfig(**SHAPE)).eval()
    widths = []
    model.wte.register_forward_hook(lambda module, inputs, output: widths.append(inputs[0].size(1)))
    prompt = torch.randint(97, (2, 20))
    assert len(list(generate(model, prompt, 30, generator=torch.Generator().manual_seed(0)))) == 30
    assert widths == [16] + [1] * 29


def test_dropout_belongs_to_the_window_and_recomputing_changes_nothing():
    model = model_away_from_its_start(GPTConfig(**SHAPE, dropout=0.5)).train()
    ids, seeds = torch.randint(97, (4, 16)), torch.tensor([5, 6, 7, 8], dtype=torch.int32)
    whole = model.hidden(ids, seeds=seeds)
    parts = torch.cat([model.hidden(ids[i : i + 1], seeds=seeds[i : i + 1]) for i in range(4)])
    assert torch.allclose(whole, parts, atol=1e-5)
    assert not torch.allclose(whole, model.eval().hidden(ids), atol=1e-2)
    model.train()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model.hidden(ids, seeds=seeds).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        recompute_activations(model)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bias": True}, "bias = True: applies to arch gpt2, and arch is llama; leave it out, or give --arch gpt2"),
        ({"arch": "gpt2", "n_kv_head": 2}, "n_kv_head = 2: applies to arch llama"),
        ({"arch": "gpt2", "qk_norm": False}, "qk_norm = False: applies to arch llama"),
        ({"n_kv_head": 3}, "n_head = 4 is not divisible by n_kv_head = 3; try --n_kv_head 1"),
        ({"n_embd": 20}, "n_embd / n_head = 5, and RoPE turns the channels of a head in pairs; try --n_embd 24"),
        ({"arch": "lama"}, "arch = 'lama': expected one of gpt2, llama"),
    ],
)
def test_what_does_not_fit_is_refused(settings, words):
    with pytest.raises(UserError) as caught:
        from_settings(SHAPE | settings)
    assert words in str(caught.value)


def test_settings_of_the_other_architecture_are_not_written_and_those_of_a_preset_are_ignored_with_a_line():
    assert not {"n_kv_head", "rope_theta", "qk_norm", "ffn_dim"} & to_settings(from_settings({})).keys()
    llama = from_settings(SHAPE | {"n_kv_head": 2})
    assert not {"bias", "gelu", "ffn_mult"} & to_settings(llama).keys()
    assert from_settings(to_settings(llama)) == llama
    said = []
    config = over_preset(read_toml("gpt2-124m"), {"arch": "llama"}, said.append)
    assert (config.model.arch, config.model.bias, config.model.n_layer) == ("llama", False, 12)
    assert said == ["bias = True, gelu = 'tanh' of the preset is ignored: arch llama has none"]


def test_a_run_of_it_resumes_bit_for_bit_is_sampled_and_started_from(here, losscurve):
    shape = flags(arch="llama", n_kv_head=1, dropout=0.2, tied_lm_head="true", save_every=5)
    assert losscurve(f"train --text text.txt --data_dir data {shape} --out_dir whole")[0] == 0
    assert losscurve(f"train --text text.txt --data_dir data {shape} --max_time 0.0001 --out_dir parts")[0] == 0
    code, _, err = losscurve("train --resume --max_time 1h --out_dir parts")
    assert code == 0, err
    ended = [fingerprint(Path(folder)) for folder in ("whole", "parts")]
    assert ended[0]["model.pt"] == ended[1]["model.pt"]
    assert ended[0]["optimizer at step 12"] == ended[1]["optimizer at step 12"]
    assert 'arch = "llama"' in Path("whole/config.toml").read_text()
    code, _, err = losscurve("sample --out_dir whole --max_new_tokens 40")
    assert code == 0, err
    code, _, err = losscurve("train --init_from whole --text text.txt --max_steps 2 --eval_every 2 --out_dir tuned")
    assert code == 0, err
    assert 'arch = "llama"' in Path("tuned/config.toml").read_text()


def test_its_weights_alone_do_not_tell_its_shape(tmp_path):
    model = make_model(GPTConfig(**SHAPE))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"only the config.toml of its run tells the sizes of a llama"):
        read_weights(tmp_path / "model.pt", GPTConfig())
    base = from_settings({name: SHAPE[name] for name in ("arch", "block_size", "n_head", "n_embd")}).model
    assert read_weights(tmp_path / "model.pt", base)[0] == dataclasses.replace(model.config, n_kv_head=4, ffn_dim=128)
