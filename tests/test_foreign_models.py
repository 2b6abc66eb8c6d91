"""Models of other programs: as transformers computes them, or refused by name before any weight is read."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import needs_gpt2
from conftest import words as random_words
from hub_server import serving
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llm.config import GPTConfig, from_settings, read_toml
from llm.errors import Failure, UserError
from llm.export.proof import HOSTILE
from llm.plan import proposal, timing
from llm.plan.timing import Pace
from llm.run import fit
from llm.tokens.bpe import gpt2
from llm.weights import open_weights
from llm.weights.foreign import read_foreign, read_shape, read_tokenizer
from llm.weights.hf_layout import weights_in

transformers = pytest.importorskip("transformers")
LLAMA = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "max_position_embeddings": 24, "bos_token_id": 1, "eos_token_id": 2},
}
GPT2 = {
    "vocab_size": 97,
    "n_positions": 24,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MODELS = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "GPT-2, another GELU, untied": (
        *("GPT2LMHeadModel", "GPT2Config"),
        GPT2 | {"activation_function": "gelu", "tie_word_embeddings": False, "n_inner": 64},
    ),
    "SmolLM2": (
        *("LlamaForCausalLM", "LlamaConfig"),
        LLAMA | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e5, "tie_word_embeddings": True},
    ),
    "TinyLlama": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"num_key_value_heads": 1, "rms_norm_eps": 1e-5}),
    "Qwen3": (
        *("Qwen3ForCausalLM", "Qwen3Config"),
        LLAMA | {"num_key_value_heads": 2, "head_dim": 16, "rope_theta": 1e6, "tie_word_embeddings": True},
    ),
}


def random_model(name):
    kind, config, settings = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def same_logits(theirs, folder="model", tolerance=1e-5):
    """Compare with transformers' model on the same weights, in float32, and return ours."""
    Path(folder, "tokenizer.json").write_text(char_tokenizer().to_str(), encoding="utf-8")
    opened = open_weights(folder, GPTConfig())
    ours = opened.model(torch.device("cpu"))
    ids = torch.randint(97, (2, 24))
    with torch.no_grad():
        expected = theirs.float()(ids).logits
        assert expected.std() > 0.1
        assert torch.allclose(ours(ids)[0], expected, atol=tolerance)
    return opened


def char_tokenizer(count=97):
    found = Tokenizer(models.WordLevel({chr(33 + i): i for i in range(count)}, unk_token="<unk>"))
    found.pre_tokenizer, found.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path("model")


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(folder, name):
    theirs = random_model(name)
    theirs.save_pretrained(folder)
    opened = same_logits(theirs)
    assert opened.config.tied_lm_head == theirs.config.tie_word_embeddings
    assert opened.config.block_size == 24


@pytest.mark.parametrize("name", ["GPT-2", "Qwen3"])
def test_shards_bfloat16_and_bin_files(folder, name):
    random_model(name).bfloat16().save_pretrained(folder, max_shard_size="8KB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert all(w.dtype == torch.float32 for w in same_logits(theirs).weights.values())
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    same_logits(theirs)
    missing = folder / "pytorch_model.bin"
    missing.unlink()
    with pytest.raises(UserError, match=r"^model: has a config\.json, but no model\.safetensors beside it"):
        open_weights("model", GPTConfig())


def test_names_as_gpt2_itself_has_them_and_as_programs_wrap_them(folder):
    theirs = random_model("GPT-2")
    theirs.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 24, 24), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    for names in (plain | masks, {f"_orig_mod.module.{name}": tensor for name, tensor in tensors.items()}):
        save_file(names, folder / "model.safetensors")
        same_logits(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_checkpoint_of_nanogpt(folder, dtype):
    """GPT-2 of transformers with biases of zero, as nanoGPT would have saved it with bias=False, compiled."""
    theirs = random_model("GPT-2, another GELU, untied")
    theirs.config.tie_word_embeddings = True
    theirs.lm_head.weight = theirs.transformer.wte.weight
    for name, p in theirs.named_parameters():
        if name.endswith("bias"):
            p.data.zero_()
    theirs.to(dtype)
    weights = {
        f"_orig_mod.{name}": tensor.t() if ("attn.c_" in name or "mlp.c_" in name) else tensor.clone()
        for name, tensor in theirs.state_dict().items()
        if not name.endswith("bias")
    }
    weights["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    arguments = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "bias": False, "vocab_size": 97}
    folder.mkdir()
    content = {
        "model": weights,
        "model_args": arguments,
        "iter_num": 9,
        "best_val_loss": torch.tensor(1.0),
        "config": {},
    }
    torch.save(content, folder / "ckpt.pt")
    with pytest.raises(UserError, match=r"ckpt\.pt: no tokenizer\.json beside it says what its 97 tokens are"):
        open_weights("model/ckpt.pt", GPTConfig())
    import pickle

    letters = {i: chr(33 + i) for i in range(97)}
    meta = {"vocab_size": 97, "itos": letters, "stoi": {letter: i for i, letter in letters.items()}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))  # as its prepare.py for characters writes it
    opened = open_weights("model/ckpt.pt", GPTConfig())
    assert (opened.config.n_head, opened.config.tied_lm_head, opened.config.block_size) == (4, True, 24)
    assert opened.tokenizer.encode("#!").tolist() == [2, 0]
    ids = torch.randint(97, (2, 24))
    with torch.no_grad():
        expected = theirs.float()(ids).logits
        assert torch.allclose(opened.model(torch.device("cpu"))(ids)[0], expected, atol=1e-5)


REFUSED = {
    "mamba": ({"model_type": "mamba"}, "'mamba': losscurve has no such architecture; it knows gpt2, llama, qwen3"),
    "Qwen2": ({"model_type": "qwen2"}, "model_type = 'qwen2'"),
    "a classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "architectures = ['LlamaForSequence"),
    "biases": ({"attention_bias": True}, "attention_bias = True: losscurve's model of this kind has False only"),
    "MLP biases": ({"mlp_bias": True}, "mlp_bias = True"),
    "GELU": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "scaled RoPE": (
        {"rope_parameters": None, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "rope_scaling.rope_type = 'llama3': losscurve does not scale",
    ),
    "linear RoPE": ({"rope_parameters": {"type": "linear", "factor": 2.0}}, "rope_parameters.rope_type = 'linear'"),
    "part of RoPE": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "a window": ({"sliding_window": 4096}, "sliding_window = 4096: losscurve's attention has no window"),
    "layers": ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types has ['sliding_attention']"),
    "RoPE by layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
        "rope_parameters = {'full_attention': {'rope_type': 'yarn'}}: expected one object for all layers",
    ),
    "4 bits": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantization_config = {'bits': 4, 'quant_method': 'gptq'}: losscurve reads weights in float32, bfloat16 and",
    ),
    "nonsense": ({"hidden_size": "wide"}, "hidden_size = 'wide': expected a whole number at least 1"),
    "layers without end": ({"num_hidden_layers": 1001}, "num_hidden_layers = 1001: expected a whole number at least"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers = 0: expected a whole number at least 1"),
    "heads": ({"num_key_value_heads": 3}, "num_attention_heads = 4 is not divisible by num_key_value_heads = 3"),
    "width": ({"head_dim": None, "hidden_size": 33}, "hidden_size = 33 is not divisible by num_attention_heads = 4"),
    "odd heads": ({"head_dim": 7}, "head_dim = 7: RoPE turns the channels of a head in pairs"),
    "no number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan: expected a number above 0"),
    "a word for yes": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes': expected true or false"),
    "Qwen3's window": ({"model_type": "qwen3", "architectures": None, "use_sliding_window": True}, "sliding_window = "),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_model_of_ours_has_is_refused_by_name_before_any_weight(folder, what):
    random_model("TinyLlama").config.save_pretrained(folder)  # there are no weights to read
    changes, words = REFUSED[what]
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        open_weights("model", GPTConfig())
    assert str(caught.value).startswith("model/config.json: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("; give another model, or correct this file if it is wrong")
    assert "--" not in str(caught.value)  # no flag of ours changes the shape of their model


def as_transformers(kind):
    """What transformers makes of each size in model/config.json, by our names; its refusal if it refuses the file."""
    try:
        theirs = transformers.AutoConfig.from_pretrained("model")
    except Exception as error:  # the library raises kinds of its own
        return error
    common = {
        "vocab_size": theirs.vocab_size,
        "block_size": theirs.max_position_embeddings,
        "n_layer": theirs.num_hidden_layers,
        "n_head": theirs.num_attention_heads,
        "n_embd": theirs.hidden_size,
        "tied_lm_head": theirs.tie_word_embeddings,
    }
    if kind == "gpt2":
        return common | {"ffn_width": theirs.n_inner or 4 * theirs.n_embd}
    return common | {
        "ffn_width": theirs.intermediate_size,
        "kv_heads": theirs.num_key_value_heads,
        "head_size": theirs.head_dim,
        "norm_eps": theirs.rms_norm_eps,
        "rope_theta": theirs.rope_parameters["rope_theta"],
    }


FIELDS = {
    "gpt2": (*GPT2, "n_inner", "activation_function", "layer_norm_epsilon", "tie_word_embeddings"),
    "llama": (*LLAMA, "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_scaling", "rope_parameters"),
    "qwen3": (*LLAMA, "num_key_value_heads", "head_dim", "sliding_window", "layer_types", "tie_word_embeddings"),
}


@pytest.mark.parametrize("kind", FIELDS)
def test_a_field_that_is_null_or_missing_means_what_transformers_takes_it_for(folder, kind):
    folder.mkdir()
    heads = {"num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 8}  # which go with the defaults too
    sizes = GPT2 | {"n_embd": 48} if kind == "gpt2" else LLAMA | {"hidden_size": 64, "rope_theta": 5e5} | heads
    refused = []
    for field in FIELDS[kind]:
        for content in (sizes | {field: None}, {name: value for name, value in sizes.items() if name != field}):
            (folder / "config.json").write_text(json.dumps({"model_type": kind} | content))
            expected = as_transformers(kind)
            if isinstance(expected, Exception):
                assert field in str(expected)
                with pytest.raises(UserError, match=rf"^model/config\.json: {field} = (null|None): "):
                    read_shape(folder)
                refused.append(field)
            elif field not in ("bos_token_id", "eos_token_id"):
                found = read_shape(folder)
                assert {name: getattr(found, name) for name in expected} == expected, field
    assert "num_hidden_layers" in refused or "n_layer" in refused
    assert not {"n_inner", "num_key_value_heads", "rope_scaling"} & {*refused}


@pytest.mark.parametrize(
    "more",
    [
        {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        {"rope_theta": 5.0, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 7.0}},
        {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_theta": 7.0}},
    ],
)
def test_the_base_of_rope_is_read_where_transformers_reads_it(folder, more):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | LLAMA | more))
    assert read_shape(folder).rope_theta == as_transformers("llama")["rope_theta"]


def test_other_names_of_gpt2s_sizes(folder):
    folder.mkdir()
    other = {"hidden_size": 96, "num_attention_heads": 3, "num_hidden_layers": 5, "max_position_embeddings": 77}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_ctx": 5} | other))
    found = read_shape(folder)
    assert {name: getattr(found, name) for name in as_transformers("gpt2")} == as_transformers("gpt2")


@pytest.mark.parametrize(
    ("field", "value"),
    [("activation_function", "relu"), ("layer_norm_epsilon", 1e-6), ("scale_attn_weights", False), ("n_inner", 65)],
)
def test_what_no_gpt2_of_ours_has_is_refused_by_name(folder, field, value):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **GPT2, field: value}))
    with pytest.raises(UserError, match=rf"^model/config\.json: {field} = '?{value}") as caught:
        open_weights("model", GPTConfig())
    if field == "activation_function":
        assert "has 'gelu_new' or 'gelu_pytorch_tanh' or 'gelu' only" in str(caught.value)


def test_damaged_and_incomplete_folders_are_named(folder):
    random_model("SmolLM2").save_pretrained(folder, max_shard_size="8KB")
    first = sorted(folder.glob("*.safetensors"))[0]
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=rf"^{first}: cut off, or no safetensors file"):
        open_weights("model", GPTConfig())
    first.unlink()
    with pytest.raises(UserError, match=rf"^{first}: missing, and model\.safetensors\.index\.json lists it"):
        open_weights("model", GPTConfig())
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../../secret"}}))
    with pytest.raises(UserError, match="not an index of files of weights"):
        open_weights("model", GPTConfig())
    index.unlink()
    whole = random_model("SmolLM2").state_dict()
    del whole["lm_head.weight"]
    for name, words in (
        ("model.layers.1.self_attn.k_proj.weight", "has no model.layers.1.self_attn.k_proj"),
        ("model.norm.weight", "has no ln_f.weight"),
    ):
        save_file({key: value for key, value in whole.items() if key != name}, folder / "model.safetensors")
        with pytest.raises(UserError, match=words):
            open_weights("model", GPTConfig())
    save_file(whole | {"model.embed_tokens.weight": torch.zeros(96, 32)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight is \(96, 32\), and this shape needs \(97, 32\)"):
        open_weights("model", GPTConfig())
    settings = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(settings))
    head = whole["model.embed_tokens.weight"]
    save_file(whole | {"lm_head.weight": head.clone()}, folder / "model.safetensors")  # tied, and saved twice
    assert torch.equal(read_foreign("model").weights["lm_head.weight"], head)
    save_file(whole | {"lm_head.weight": head + 1}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"has an lm_head\.weight of its own, .*, which config\.json asks for"):
        open_weights("model", GPTConfig())
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not readable as JSON"):
        open_weights("model", GPTConfig())


# ---- tokenizers

TEXT = ["".join(HOSTILE) * 4, "the cat sat on the mat. " * 50, "x = 12345; y = x + 678\n\n" * 30]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def like_smollm():
    found = Tokenizer(models.BPE())
    digits, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    found.decoder = decoders.ByteLevel()
    return trained(found, ["<|endoftext|>", "<|im_start|>"], pre_tokenizers.ByteLevel.alphabet())


def like_qwen():
    found = Tokenizer(models.BPE())
    found.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.pre_tokenizer, found.decoder = pre_tokenizers.Sequence([split, level]), decoders.ByteLevel()
    return trained(found, ["<|endoftext|>", "<|im_start|>"], pre_tokenizers.ByteLevel.alphabet())


def like_tinyllama():
    found = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    joined = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    found.decoder = decoders.Sequence(joined)
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    found.train_from_iterator(["the cat sat on the mat", *(line for line in TEXT[1:])], trainer)
    content = json.loads(found.to_str())  # the bytes are tokens of the vocabulary, not special ones
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in specials[:3]]
    return Tokenizer.from_str(json.dumps(content))


def trained(tokenizer, specials, alphabet):
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


TOKENIZERS = {
    "SmolLM2": (like_smollm, "<|endoftext|>"),
    "Qwen3": (like_qwen, "<|im_start|>"),
    "TinyLlama": (like_tinyllama, "</s>"),
}


def save_tokenizer(folder, kind):
    make, end = TOKENIZERS[kind]
    folder.mkdir(exist_ok=True)
    library = make()
    library.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": {"content": end} if end[0] == "<" else end}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return library


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_is_taken_along(folder, kind):
    library = save_tokenizer(folder, kind)
    ours = read_tokenizer(folder)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert ours.kind == "hf"
    assert ours.end_of_text == library.token_to_id(TOKENIZERS[kind][1])
    for text in [*HOSTILE, *TEXT]:
        expected = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text).tolist() == expected
        if kind != "TinyLlama":  # which has no bytes of its own for what it has not seen, and an unknown token
            composed = library.normalizer.normalize_str(text) if library.normalizer else text
            assert ours.decode(ours.encode(text)) == composed
            assert ours.token_bytes()[ours.encode(text)].sum() == len(composed.encode())
    assert ours.decode(ours.encode("the cat sat.")).lstrip(" ") == "the cat sat."


@needs_gpt2
def test_gpt2s_own_tokenizer_is_recognised(folder):
    """Its file has one merge a token and end-of-text in the vocabulary."""
    from llm.tokens import huggingface

    content = json.loads(huggingface.write(gpt2(offline=True)))
    content["model"]["vocab"]["<|endoftext|>"] = 50256
    assert huggingface.read(json.dumps(content), "<|endoftext|>").kind == "gpt2"
    assert content["model"].pop("type") == "BPE"  # nor does that of the hub name a type, nor its config an eos_token
    assert huggingface.read(json.dumps(content), None).kind == "gpt2"
    content["pre_tokenizer"]["add_prefix_space"] = True  # RoBERTa's
    assert huggingface.read(json.dumps(content), "<|endoftext|>").kind == "hf"


def test_a_tied_model_without_its_embedding_is_named():
    """As value heads and adapters save it, with other prefixes."""
    config = GPTConfig(vocab_size=8, block_size=4, n_layer=1, n_head=1, n_embd=4, tied_lm_head=True)
    with pytest.raises(UserError, match=r"has no token embedding among its names \(pretrained_model\.wte\.weight, …\)"):
        weights_in(config, {"pretrained_model.wte.weight": torch.zeros(8, 4)})


def like_unigram():
    """SentencePiece's other kind, whose vocabulary is a list; as transformers makes them, with a space in front."""
    found = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("▁", -3.0), *((letter, -4.0) for letter in "abcdefgh")], unk_id=0)
    )
    found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return found


def test_a_space_in_front_of_a_text_is_known_when_a_text_is_prepared(tmp_path):
    """Each piece that is encoded gets one, so that the tokens have other bytes than the text."""
    from llm.prepare.prepare import prepare
    from llm.tokens import huggingface

    level = like_smollm()
    level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    (tmp_path / "text.txt").write_text("abc de\nfgh " * 200, encoding="utf-8")
    for name, library in (("unigram", like_unigram()), ("level", level)):
        tokenizer = huggingface.read(library.to_str(), None)
        assert (tokenizer.kind, tokenizer.is_lossless) == ("hf", False)
        prepare((str(tmp_path / "text.txt"),), tmp_path / name, "hf", given=tokenizer)
    level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert huggingface.read(level.to_str(), None).is_lossless


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not a tokenizer.json"),
        ("[]", "not a tokenizer.json"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}}, "added_tokens": []}', "not a tokenizer.json"),
        (
            char_tokenizer().to_str().replace('"Fuse"', '"WordPiece","prefix":"##","cleanup":true'),
            "neither byte-level nor",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_named(folder, content, words):
    folder.mkdir()
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"^model/tokenizer\.json: ") as caught:
        read_tokenizer(folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- the commands


def foreign(folder, model="Qwen3", tokenizer="Qwen3", context=512):
    """A folder as people download it, with a vocabulary that is larger than its tokenizer's."""
    kind, config, settings = MODELS[model]
    torch.manual_seed(0)
    sizes = settings | {"vocab_size": 640, "max_position_embeddings": context}
    getattr(transformers, kind)(getattr(transformers, config)(**sizes)).save_pretrained(folder)
    save_tokenizer(folder, tokenizer)


def test_what_goes_on_from_a_fine_tuned_run_is_fine_tuning_too(here, losscurve):
    foreign(here / "model")
    sizes = "--max_steps 2 --sample_tokens 0"
    assert losscurve(f"train --text text.txt --init_from model {sizes} --out_dir tuned")[0] == 0
    environment = here / "tuned/env.json"  # from another machine: a resume writes it anew
    environment.write_text(json.dumps(json.loads(environment.read_text()) | {"torch": "1.0"}))
    assert losscurve("train --resume --max_steps 3 --out_dir tuned")[0] == 0
    assert losscurve("fork tuned --at 3 --max_steps 4 --out_dir forked")[0] == 0
    for start in ("tuned/step-000003", "forked"):
        code, out, err = losscurve(f"train --text text.txt --init_from {start} {sizes} --overwrite --out_dir again")
        assert code == 0, err
        assert "\nfine-tuning: block_size 256, batch_size 8, max_lr 0.0013" in out
    said = []
    fit("text.txt", init_from="model", max_steps=1, sample_tokens=0, out_dir="here", say=said.append)
    assert sum(line.startswith("fine-tuning: block_size 256") for line in said) == 1
    (here / "tuned/env.json").unlink()  # then nothing tells
    code, out, err = losscurve(f"train --text text.txt --init_from tuned {sizes} --overwrite --out_dir again")
    assert (code, "fine-tuning" in out + err) == (0, False)


@pytest.mark.parametrize("kind", ["Qwen3", "TinyLlama"])
def test_it_is_fine_tuned_resumed_sampled_and_exported(here, losscurve, kind):
    foreign(here / "model", kind, kind)
    code, out, err = losscurve(
        "train --text text.txt --init_from model --max_steps 4 --sample_tokens 3 --out_dir tuned"
    )
    assert code == 0, err
    assert "\nfine-tuning: block_size 256, batch_size 8, max_lr 0.0013, order epochs, grad_clip 1.0, patience 3" in out
    assert "fine-tuning" not in err
    config = from_settings(read_toml("tuned/config.toml"))
    assert (config.tokenizer, config.vocab_size, config.data_dir) == ("hf", 640, "data/text-for-model")
    assert (config.max_steps, config.eval_every, config.batch_size, config.model.block_size) == (4, 1, 8, 256)
    assert "Chinchilla" not in out  # its weights have learned from other tokens
    losses = [json.loads(line)["loss"] for line in Path("tuned/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert losscurve("train --resume --max_steps 5 --out_dir tuned")[0] == 0
    assert losscurve("sample --out_dir tuned --prompt the --max_new_tokens 3")[0] == 0
    assert losscurve("sample --checkpoint model --prompt the --max_new_tokens 3 --temperature 0")[0] == 0
    code, _, err = losscurve("sample --out_dir model --prompt the")
    assert (code, "sample from it with --checkpoint model" in err) == (2, True)
    code, out, err = losscurve("export tuned --to hf")
    assert code == 0, err
    assert "of validation text" in out
    card = Path("tuned-hf/README.md").read_text(encoding="utf-8")
    assert "A llama trained on text with losscurve, from the weights of model." in card
    before = sorted(here.rglob("*"))
    for name in ("model.pt", "best.pt"):
        shutil.move(here / "tuned" / name, here / name)
    for to in ("gguf", "html"):  # it is refused before any weight is read
        code, out, err = losscurve(f"export tuned --to {to}")
        assert (code, out) == (2, "")
        assert "export it with: losscurve export tuned --to hf" in err
    for name in ("model.pt", "best.pt"):
        shutil.move(here / name, here / "tuned" / name)
    assert sorted(here.rglob("*")) == before
    same = (
        Tokenizer.from_file("tuned-hf/tokenizer.json").to_str() == Tokenizer.from_file("model/tokenizer.json").to_str()
    )
    assert same
    code, _, err = losscurve("train --text text.txt --tokenizer hf --out_dir other")
    assert (code, "--init_from" in err) == (2, True)


def test_a_plan_counts_the_tokens_of_the_weights(here, losscurve, monkeypatch):
    """For each kind of tokenizer, also that of a run of ours, and a text that is too short for them."""
    monkeypatch.setattr(timing, "probe", lambda config: Pace(0.1, 1e-4, 1e-4))
    assert losscurve("train --text text.txt --tokenizer bpe --vocab_size 300 --max_steps 1 --out_dir ours")[0] == 0
    for kind in ("Qwen3", "TinyLlama"):
        foreign(here / kind, kind, kind)
    text = random_words(1500)
    (here / "other.txt").write_text(text, encoding="utf-8")
    (here / "short.txt").write_text(text[:50], encoding="utf-8")
    for source in ("Qwen3", "TinyLlama", "ours"):  # another text than the tokenizers were trained on
        code, out, err = losscurve(f"plan --text other.txt --init_from {source} --json")
        assert code == 0, err
        tokens = len(open_weights(source, GPTConfig()).tokenizer.encode(text))
        assert json.loads(out)["text_tokens"] == pytest.approx(0.9 * tokens, abs=1)
        # on accelerators it is the same run, also with a batch that is the chapter's and not fine-tuning's
        line = f"plan --text other.txt --init_from {source} --batch_size 32"
        steps = 5000 if source == "ours" else 20  # three passes over so short a text are fewer than the least
        run = json.loads(losscurve(f"{line} --json")[1])
        assert run["run_flops"] == steps * run["step_flops"]
        code, out, err = losscurve(f"{line} --accelerator h100")
        assert code == 0, err
        assert f"; {steps:,} steps of 32 windows, " in out
        for command in ("plan", "train"):
            code, out, err = losscurve(f"{command} --text short.txt --init_from {source} --out_dir other")
            assert (code, out) == (2, "")
            assert err.endswith("give more text or a smaller --block_size\n")


DAMAGES = {
    "a truncated file": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "cut off, or no safetensors file"),
    "a missing shard": (lambda path: path.unlink(), "missing, and model.safetensors.index.json lists it"),
    "an unknown architecture": (
        lambda path: path.with_name("config.json").write_text('{"model_type": "mamba"}'),
        "config.json: model_type = 'mamba': losscurve has no such architecture",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_model_is_one_line_and_starts_nothing(here, losscurve, capsys, what):
    foreign(here / "model")
    opened = transformers.AutoModelForCausalLM.from_pretrained("model")
    (here / "model/model.safetensors").unlink()
    opened.save_pretrained("model", max_shard_size="30KB")
    damage, words = DAMAGES[what]
    damage(max((here / "model").glob("*.safetensors"), key=lambda path: path.stat().st_size))
    before = sorted(here.rglob("*"))
    capsys.readouterr()  # the progress bars of transformers
    for command in (
        "train --text text.txt --init_from model --max_steps 1",
        "plan --text text.txt --init_from model",
        "sample --checkpoint model --prompt the",
        "evaluate model --text text.txt",
    ):
        code, out, err = losscurve(command)
        assert (code, out) == (2, "")
        assert words in err
        assert len(err.splitlines()) == 1
    assert sorted(here.rglob("*")) == before


def test_flags_come_before_the_defaults_of_fine_tuning(here, losscurve):
    foreign(here / "model")
    # but for the steps, the chapter's
    typed = "--block_size 64 --max_lr 3e-4 --max_steps 5 --batch_size 32 --eval_every 250 --order replacement"
    code, _, err = losscurve(f"train --text text.txt --init_from model {typed} --sample_tokens 0 --out_dir tuned")
    assert code == 0, err
    config = from_settings(read_toml("tuned/config.toml"))
    assert (config.model.block_size, config.max_lr, config.max_steps, config.batch_size) == (64, 3e-4, 5, 32)
    assert (config.eval_every, config.order) == (250, "replacement")
    code, _, err = losscurve("train --text text.txt --init_from model --block_size 1024 --out_dir other")
    assert (code, "block_size = 1024: the weights of model have 512; leave it out" in err) == (2, True)
    code, _, err = losscurve("train --text text.txt --init_from model --n_layer 4 --out_dir other")
    assert (code, "n_layer = 4: the weights of model have 2; leave it out" in err) == (2, True)


def test_a_shorter_context_leaves_out_positions(here, losscurve):
    foreign(here / "model", "GPT-2", "SmolLM2")
    code, _, err = losscurve("train --text text.txt --init_from model --block_size 8 --max_steps 1 --sample_tokens 0")
    assert code == 0, err
    tuned, base = open_weights("checkpoints", GPTConfig()), open_weights("model", GPTConfig())
    assert tuned.weights["wpe.weight"].shape == (8, 32)
    assert torch.allclose(tuned.weights["wpe.weight"], base.weights["wpe.weight"][:8], atol=0.01)


def test_time_chooses_the_steps_and_keeps_to_fine_tuning(here, losscurve, monkeypatch):
    monkeypatch.setattr(proposal, "short_probe", lambda config, seconds: Pace(0.05, 1e-6, 1e-3))
    foreign(here / "model", context=50)  # shorter than the time suggests
    code, out, err = losscurve("train --text text.txt --init_from model --time 10s --sample_tokens 0 --out_dir tuned")
    assert code == 0, err
    assert "the weights of model" in out
    assert "characters: the weights' own tokens, " in out
    config = from_settings(read_toml("tuned/config.toml"))
    assert (config.optimizer, config.max_lr, config.patience, config.tokenizer) == ("adamw", 0.0013, 3, "hf")
    assert config.model.block_size == 50
    epochs = config.max_steps * config.tokens_per_step / np.fromfile("data/text-for-model/train.bin", "<u2").size
    assert epochs <= 3 or config.max_steps == 20
    code, out, err = losscurve("plan --text text.txt --init_from model")
    assert code == 0, err
    assert "of 8 windows, max_lr 0.0013" in out


def test_a_run_of_another_context_takes_a_time_too(here, losscurve, monkeypatch):
    monkeypatch.setattr(proposal, "short_probe", lambda config, seconds: Pace(0.05, 1e-6, 1e-3))
    shape = "--n_layer 1 --n_head 1 --n_embd 16 --block_size 32 --max_steps 1 --warmup_steps 0 --sample_tokens 0"
    assert losscurve(f"train --text text.txt --tokenizer byte {shape} --out_dir base")[0] == 0
    code, _, err = losscurve("train --text text.txt --init_from base --time 6s --sample_tokens 0 --out_dir tuned")
    assert code == 0, err
    assert from_settings(read_toml("tuned/config.toml")).model.block_size == 32


def test_a_name_on_the_hub_is_downloaded_once(here, losscurve, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "cache"))
    foreign(here / "model")
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        hub.models["someone/tiny"] = {path.name: path.read_bytes() for path in (here / "model").iterdir()}
        hub.models["someone/tiny"]["pickle.py"] = b"evil"
        shutil.rmtree(here / "model")
        code, _, err = losscurve("sample --checkpoint someone/tiny --prompt the --max_new_tokens 2")
        assert code == 0, err
        assert not list((here / "cache").rglob("pickle.py"))
        refused = {"config.json": b'{"model_type": "mamba"}', "model.safetensors": b"x"}
        hub.models["someone/other"] = refused
        with pytest.raises(UserError, match="model_type = 'mamba'"):
            open_weights("someone/other", GPTConfig())
        assert not any("other/resolve" in line and "safetensors" in line for line in hub.asked)
        with pytest.raises(Failure, match="someone/nothing: no such file or folder here, and it cannot be read from"):
            open_weights("someone/nothing", GPTConfig())
    # the server is gone, and the cache has the model
    assert losscurve("sample --checkpoint someone/tiny --prompt the --max_new_tokens 2")[0] == 0
