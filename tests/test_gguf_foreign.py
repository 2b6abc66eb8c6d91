"""GGUF files that other programs wrote: as transformers and llama.cpp read them, or refused by name."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import needs_gpt2, words
from test_foreign_models import random_model
from test_gguf import UNUSUAL, needs_llama_cpp
from test_gguf import random_model as our_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from llm.checks.memorised import run_tokens
from llm.config import GPTConfig
from llm.errors import UserError
from llm.evaluate import evaluate
from llm.export import llama_cpp
from llm.export.gguf_file import write_gguf
from llm.export.proof import HOSTILE
from llm.generate import generate
from llm.record.metrics import read_record
from llm.run import Run
from llm.tokens.bpe import gpt2, to_printable
from llm.tokens.gguf import read_tokenizer
from llm.tokens.merges import merges
from llm.tokens.tokenizer import Bytes
from llm.weights import open_weights

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
NAMES = {"GPT2LMHeadModel": "gpt2", "LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
TEXTS = [*UNUSUAL, *HOSTILE, "".join(UNUSUAL), words(300)]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def characters(count=97):
    """The metadata of a tokenizer of `count` tokens: some bytes, and one merge."""
    names = [*to_printable([bytes([i]) for i in range(33, 32 + count)]), "ab"]
    return {"model": "gpt2", "pre": "gpt-2", "tokens": names, "types": [1] * count, "merges": ["a b"]}


def permuted(weight, heads):
    """The rows of queries or keys as llama.cpp's converter has them for its architecture llama."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(model, tokenizer, dtype="F32", arch=None, **more):
    """Write a model of transformers as llama.cpp's converter does, under the names that the package gguf has for it."""
    config, arch = model.config, arch or NAMES[type(model).__name__]
    out = gguf.GGUFWriter("m.gguf", arch)
    is_gpt2 = arch == "gpt2"
    out.add_context_length(config.n_positions if is_gpt2 else config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length((config.n_inner or 4 * config.n_embd) if is_gpt2 else config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    if is_gpt2:
        out.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        out.add_head_count_kv(config.num_key_value_heads)
        out.add_layer_norm_rms_eps(config.rms_norm_eps)
        out.add_rope_freq_base(config.rope_parameters["rope_theta"])
        out.add_key_length(config.head_dim)
        out.add_value_length(config.head_dim)
        out.add_rope_dimension_count(config.head_dim)
    add_tokenizer(out, **tokenizer)
    for key, value in more.items():
        out.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.get_type(value))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = weight.float().numpy()
        if is_gpt2 and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            array = array.T
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = permuted(array, heads)
        fits = "F16" if dtype == "Q8_0" and array.shape[-1] % 32 else dtype
        kind = gguf.GGMLQuantizationType[fits if array.ndim > 1 and "wpe" not in name else "F32"]
        data = gguf.quants.quantize(np.ascontiguousarray(array), kind)
        out.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=kind)
    finish(out)


def add_tokenizer(out, model, tokens, types, merges, pre, eos=None):
    out.add_tokenizer_model(model)
    if pre:
        out.add_tokenizer_pre(pre)
    out.add_token_list(tokens)
    out.add_token_types(types)
    out.add_token_merges(merges)
    out.add_add_bos_token(False)
    if eos is not None:
        out.add_eos_token_id(eos)


def finish(out):
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def opened():
    return open_weights("m.gguf", GPTConfig())


@pytest.mark.parametrize("name", ["GPT-2", "SmolLM2", "TinyLlama", "Qwen3"])
def test_logits_are_those_of_transformers(name):
    theirs = random_model(name)
    ids = torch.randint(97, (2, 24))
    with torch.no_grad():
        expected = theirs(ids).logits
        largest = expected.abs().max()
        for dtype, bound in {"F32": 2e-6, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 5e-2}.items():
            write(theirs, characters(), dtype)
            found = opened()
            assert all(weight.dtype == torch.float32 for weight in found.weights.values())
            ours = found.model(torch.device("cpu"))(ids)[0]
            difference = ((ours - expected).abs().max() / largest).item()
            assert difference < bound, dtype
            if dtype != "F32":
                assert difference > 1e-5, dtype  # it was written in fewer bits
    assert found.config.tied_lm_head == theirs.config.tie_word_embeddings
    assert not found.is_ours


# ---- tokenizers


def split(regex):
    return pre_tokenizers.Split(Regex(regex), "isolated")


def trained_tokenizer(kind, special_first):
    """A small byte-level BPE that splits a text as the model `kind` does, by the tokenizer.json of that model."""
    end = r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    contractions = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    steps = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "qwen2": [split(contractions + end)],
        "llama-bpe": [split(contractions + end.replace(r"\p{N}|", r"\p{N}{1,3}|", 1))],
    }[kind]
    found = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # so that merges cross the splits of `kind`
    found.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=special if special_first else [], show_progress=False
    )
    found.train_from_iterator(["".join(UNUSUAL) * 9 + "1234567 12345 12 " * 9 + words(2000)], trainer)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt-2", "smollm"))
    found.pre_tokenizer = pre_tokenizers.Sequence([*steps, whole])
    if kind == "llama-bpe":  # some words are tokens only because they are in the vocabulary
        described = json.loads(found.to_str())
        del described["model"]["merges"][-200:]
        found = Tokenizer.from_str(json.dumps(described))
    if not special_first:
        found.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    found.add_tokens([AddedToken("<tool>", normalized=False)])  # llama.cpp's user-defined: found in any text
    return found


def metadata(library, pre):
    """A tokenizer as llama.cpp's converter writes it, with five unused tokens at the end."""
    described = json.loads(library.to_str())
    ids = library.get_vocab()
    special = {token["content"]: token["special"] for token in described["added_tokens"]}
    tokens = sorted(ids, key=ids.get)
    types = [1 if token not in special else 3 if special[token] else 4 for token in tokens]
    padding = [f"[PAD{i}]" for i in range(5)]
    pairs = [" ".join(pair) for pair in described["model"]["merges"]]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens + padding,
        "types": types + [5] * 5,
        "merges": pairs,
        "eos": ids["<|endoftext|>"],
    }


def tiny(V):
    """A llama of transformers with V tokens."""
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=8,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("special_first", [True, False], ids=["special first", "special last"])
@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_a_tokenizer_is_the_one_that_the_model_came_with(kind, special_first):
    library = trained_tokenizer(kind, special_first)
    library.encode_special_tokens = True
    described = metadata(library, kind)
    write(tiny(len(described["tokens"])), described)
    found = opened()
    assert found.config.vocab_size == len(described["tokens"])
    assert found.tokenizer.vocab_size == len(described["tokens"]) - 5
    assert found.tokenizer.end_of_text == described["eos"]
    for text in (*TEXTS, "a<tool>b"):
        assert found.tokenizer.encode(text).tolist() == library.encode(text).ids
        assert found.tokenizer.decode(found.tokenizer.encode(text)) == text


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["smollm", "qwen2", "llama-bpe"])
def test_llama_cpp_splits_a_text_the_same_way(kind):
    described = metadata(trained_tokenizer(kind, True), kind)
    write(tiny(len(described["tokens"])), described)
    tokenizer = opened().tokenizer
    with llama_cpp.llama_cpp(Path("m.gguf")) as reader:
        for text in TEXTS:
            assert tokenizer.encode(text).tolist() == reader.encode(text), text


@needs_gpt2
def test_gpt2_itself_becomes_ours():
    ours = gpt2(offline=True)
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*to_printable(ours.tokens[:-1]), "<|endoftext|>"],
        "token_type": [1] * 50256 + [3],
        "merges": [f"{left} {right}" for left, right in merges(ours)],
        "eos_token_id": 50256,
    }
    found = read_tokenizer({f"tokenizer.ggml.{key}": value for key, value in fields.items()})
    assert (found.kind, found.to_json()) == ("gpt2", ours.to_json())


# ---- what is refused


REFUSED = {
    "SentencePiece": ({"model": "llama"}, {}, "tokenizer is SentencePiece's ('llama'), and the file has scores but no"),
    "WordPiece": ({"model": "bert"}, {}, "its tokenizer is 'bert'; expected gpt2, which is byte-level BPE"),
    "another split": ({"pre": "tekken"}, {}, "splits a text like 'tekken'; losscurve knows gpt-2, smollm, qwen2"),
    "no split": ({"pre": None}, {}, "splits a text like None"),
    "bad merges": ({"merges": ["a b", "x yz"]}, {}, "its tokens and merges do not belong together"),
    "twins": ({"tokens": ["ab"] * 97}, {}, "two of its tokens have the same name"),
    "no such end": ({"eos": 97}, {}, "list index out of range"),
    "experts": ({}, {"llama__expert_count": 8}, "its llama.expert_count is 8, and losscurve has 0"),
    "a window": ({}, {"llama__attention__sliding_window": 4096}, "llama.attention.sliding_window is 4096"),
    "RoPE": ({}, {"llama__rope__scaling__type": "yarn"}, "scales the angles of its RoPE"),
    "parts": ({}, {"split__count": 3}, "one of 3 parts; join them with llama-gguf-split --merge"),
    "other RoPE": ({}, {"llama__rope__dimension_count": 2}, "llama.rope.dimension_count is 2, and losscurve has 8"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_model_of_ours_has_is_refused_by_name(what):
    tokenizer, more, reason = REFUSED[what]
    write(random_model("TinyLlama"), characters() | tokenizer, **more)
    with pytest.raises(UserError) as caught:
        opened()
    assert str(caught.value).startswith("m.gguf: not a GGUF file that losscurve can read (")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_tensor_a_missing_one_and_a_wrong_shape_are_named():
    model = random_model("TinyLlama")
    biased = copy.deepcopy(model)
    biased.model.layers[1].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(32))
    write(biased, characters())
    with pytest.raises(UserError, match=r"it has blk\.1\.attn_q\.bias, which no model of ours has"):
        opened()
    model.config.num_hidden_layers = 3
    write(model, characters())
    with pytest.raises(UserError, match=r"^m\.gguf: has no blk\.2\.attn_q\.weight, which a model of ours needs"):
        opened()
    model.config.num_hidden_layers, model.config.intermediate_size = 2, 41
    write(model, characters())
    with pytest.raises(
        UserError, match=r"^m\.gguf: h\.0\.mlp\.c_fc\.weight is \(80, 32\), and this shape needs \(82, 32"
    ):
        opened()


def test_a_file_that_only_has_the_name_is_refused():
    Path("m.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"^m\.gguf: not a GGUF file; give another"):
        opened()


# ---- what goes on from it


def test_a_file_is_sampled_from_and_trained_from(here, losscurve):
    model = our_model(arch="llama", block_size=16)
    write_gguf(model, Bytes(), Path("m.gguf"), "float32", "m")
    code, out, err = losscurve("sample --checkpoint m.gguf --prompt ab --max_new_tokens 9 --temperature 0 --ignore_end")
    ids = torch.tensor([list(b"ab")])
    drawn = [int(token) for token in generate(model, ids, 9, temperature=0, vocab_size=257)]
    assert (code, out, err) == (0, f"ab{Bytes().decode(drawn)}\n", "")
    code, out, err = losscurve("train --text text.txt --init_from m.gguf --max_steps 2 --eval_every 2 --dtype float32")
    assert code == 0, err
    assert Run.open("checkpoints").config.tokenizer == "byte"
    first = next(row for row in read_record(Path("checkpoints")) if row["split"] == "val")
    tokens = run_tokens(Run.open("checkpoints")).val
    expected = evaluate(model, tokens, 16, Run.open("checkpoints").config.eval_tokens)
    assert (first["step"], first["loss"]) == (0, pytest.approx(expected.loss, rel=1e-6))
