"""GGUF: llama.cpp itself tokenizes and continues as the run does; the file comes back as the same model."""

import dataclasses
import json
import re
import resource
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, config_for, needs_gpt2, trained, words

from llm.arch import make_model
from llm.config import GPTConfig
from llm.errors import Failure, UserError
from llm.export import gguf_export, llama_cpp
from llm.export.gguf_export import BOUNDS, GELU_BOUND, export_gguf
from llm.export.gguf_file import write_gguf
from llm.export.proof import HOSTILE
from llm.export.source import Source
from llm.run import Run
from llm.tokens.bpe import gpt2, train_bpe
from llm.tokens.tokenizer import Bytes, Characters
from llm.weights import gguf_layout
from llm.weights.gguf_file import read_gguf

pytest.importorskip("gguf")
PAGE = (ROOT / "docs" / "elsewhere.md").read_text(encoding="utf-8")
needs_llama_cpp = pytest.mark.skipif(not llama_cpp.is_installed(), reason="xllamacpp is not installed")

SHAPES = {
    "gpt2 tied, tanh": {"gelu": "tanh", "tied_lm_head": True},
    "gpt2 untied, tanh, biases": {"gelu": "tanh", "bias": True, "ffn_mult": 3},
    "gpt2 exact GELU": {},
    "llama GQA": {"arch": "llama", "qk_norm": False, "n_kv_head": 2},
    "llama tied": {"arch": "llama", "qk_norm": False, "tied_lm_head": True, "rope_theta": 5e5, "ffn_dim": 100},
    "qwen3 GQA": {"arch": "llama", "n_kv_head": 1, "rope_theta": 1e6},
    "qwen3 tied, wide heads": {"arch": "llama", "tied_lm_head": True, "head_dim": 24, "norm_eps": 1e-5},
}
UNUSUAL = (
    "I'M i'm I'LL i'll ''d ' d 's's x's\n's 're've DON'T don’t",
    "1 12 123 1234 ½²٣Ⅳ 3.14 1e-5 x1y2 ４２",
    " \t\r\n\r\n   \u00a0\u3000\u2003 end  \n \n\n  a\x0b\x0c\x1c\x85b\u2028c   ",
    "👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿 é e\u0301 n\u0303\u0303 漢字かな 中文，测试。 العربية مَرْحَبًا ไทย हिन्दी 한국어 \x01\x02\x1b\x7f",
    "<|endoftext|> <|endoftext|>x <|im_end|> </s> <s> <|eot_id|> <EOT> <|fim_prefix|> [PAD] unused 1 no merges",
)


def random_model(**shape):
    """A model whose weights are far from those of a new model, so that every one of them counts."""
    torch.manual_seed(1)
    model = make_model(
        GPTConfig(**{"vocab_size": 257, "block_size": 24, "n_layer": 2, "n_head": 4, "n_embd": 64} | shape)
    )
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.5 if name.startswith("w") else weight.size(1) ** -0.5)
        else:
            torch.nn.init.normal_(weight, mean=float("bias" not in name), std=0.2)
    return model.eval()


def source_of(model, tokenizer=None, tokens=300):
    """A source whose validation text is `tokens` random ids of whole characters."""
    ids = np.random.default_rng(0).integers(32, 64, tokens)
    return Source(SimpleNamespace(path=Path("run")), "model.pt", model, tokenizer or Bytes(), ids)


def export(source, dtype="float32", out="m.gguf", overwrite=False):
    """Export, and return what it says."""
    said = []
    export_gguf(source, Path(out), dtype, overwrite, said.append)
    return "\n".join(said)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llama_cpp, "POSITIONS", 40)


def bare_model(tokenizer, padding=0):
    return make_model(
        GPTConfig(vocab_size=tokenizer.vocab_size + padding, block_size=8, n_layer=1, n_head=1, n_embd=8, arch="llama")
    )


# ---- llama.cpp


@needs_llama_cpp
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_llama_cpp_computes_what_the_run_does(shape):
    source = source_of(random_model(**shape))
    bound = BOUNDS["float32"] if source.model.config.arch == "llama" else GELU_BOUND
    write_gguf(source.model, source.tokenizer, Path("m.gguf"), "float32", "m")
    proof = llama_cpp.prove_by_llama_cpp(source, Path("m.gguf"), bound)
    assert proof.equal == proof.continued == 24 - 12
    assert proof.proof.positions == 2 * 2 * 23
    assert proof.proof.validation_tokens == 300
    assert proof.proof.loss == pytest.approx(proof.proof.export_loss, abs=bound)


@needs_llama_cpp
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_fewer_bits_are_proved_within_their_bound(dtype):
    said = export(source_of(random_model(arch="llama", n_embd=72)), dtype)
    difference = float(re.search(r"in float32 by at most (\S+)", said)[1])
    assert BOUNDS["float32"] < difference < BOUNDS[dtype] / 3
    if dtype == "q8_0":  # rows of 72 do not divide by 32, rows of ffn_dim = 192 do
        assert "14 matrices are in float16 (token_embd.weight, output.weight, blk.0.attn_q.weight, …)" in said


def tokenizers():
    text = "".join(UNUSUAL) * 9 + "1234567 12345 " * 9
    return [(Bytes(), 0), (train_bpe([text], 700), 7), (Characters("".join(UNUSUAL)), 4)]


@needs_llama_cpp
@pytest.mark.parametrize(("tokenizer", "padding"), tokenizers(), ids=["byte", "bpe", "char"])
def test_llama_cpp_tokenizes_as_ours_does(tokenizer, padding):
    write_gguf(bare_model(tokenizer, padding), tokenizer, Path("m.gguf"), "float32", "m")
    with llama_cpp.llama_cpp(Path("m.gguf")) as reader:
        for text in (*UNUSUAL, "".join(UNUSUAL), words(500) if tokenizer.kind != "char" else ""):
            assert reader.encode(text) == tokenizer.encode(text).tolist()
            assert reader.decode(reader.encode(text)) == text


@needs_gpt2
@needs_llama_cpp
def test_llama_cpp_tokenizes_as_gpt2_does():
    tokenizer = gpt2(offline=True)
    write_gguf(bare_model(tokenizer, padding=47), tokenizer, Path("m.gguf"), "float32", "m")
    with llama_cpp.llama_cpp(Path("m.gguf")) as reader:
        for text in (*UNUSUAL, "".join(UNUSUAL), *HOSTILE, words(500)):
            assert reader.encode(text) == tokenizer.encode(text).tolist()


def always(token, tokenizer):
    """A model that finds `token` the likeliest after anything."""
    model = bare_model(tokenizer)
    torch.nn.init.ones_(model.wte.weight)
    with torch.no_grad():
        model.lm_head.weight[token] = 1.0
    return model


@needs_llama_cpp
@pytest.mark.parametrize(
    ("tokenizer", "token", "count"), [(Characters("abcdefghijklmnop"), 11, 5), (Bytes(), 11, 5), (Bytes(), 256, 1)]
)
def test_llama_cpp_stops_at_end_of_text_only(tokenizer, token, count):
    write_gguf(always(token, tokenizer), tokenizer, Path("m.gguf"), "float32", "m")
    with llama_cpp.llama_cpp(Path("m.gguf")) as reader:
        assert reader.greedy([1, 2], 5) == [token] * count


@needs_llama_cpp
def test_a_character_outside_the_alphabet_is_refused_by_llama_cpp():
    tokenizer = Characters("abc")
    write_gguf(bare_model(tokenizer), tokenizer, Path("m.gguf"), "float32", "m")
    with llama_cpp.llama_cpp(Path("m.gguf")) as reader, pytest.raises(UserError, match="invalid tokens"):
        reader.greedy(reader.encode("abx"), 1)


# ---- the export is proved, or absent


@needs_llama_cpp
def test_a_mismatch_is_refused_and_leaves_nothing(monkeypatch):
    monkeypatch.setattr(gguf_layout, "_interleave_pairs", lambda weight, heads: weight)
    source = source_of(random_model(arch="llama", qk_norm=False))
    with pytest.raises(UserError, match=r"log-probabilities differ from the run's by 0\.\d+ .* nothing was written"):
        export(source)
    assert list(Path().iterdir()) == []


@needs_llama_cpp
def test_other_token_ids_are_refused(monkeypatch):
    tokenizer = train_bpe([words(3000)], 300)
    source = source_of(bare_model(tokenizer), tokenizer)
    monkeypatch.setattr("llm.tokens.gguf.merges", lambda tokenizer: [("a", "b")])
    with pytest.raises(UserError, match="does not tokenize as the run does"):
        export(source)
    assert list(Path().iterdir()) == []


@needs_llama_cpp
def test_a_file_that_llama_cpp_does_not_load_is_refused():
    Path("m.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match=r"^llama\.cpp does not load the file"), llama_cpp.llama_cpp(Path("m.gguf")):
        pass


@pytest.mark.parametrize("bits", ["float32", "q8_0"])
def test_without_llama_cpp_the_gguf_reader_proves_it(monkeypatch, bits):
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    said = export(source_of(random_model()), bits)
    assert "read back by the package gguf" in said
    assert "llama.cpp itself has not read it" in said
    assert "GELU by tanh" in said
    assert float(re.search(r"in float32 by at most (\S+)", said)[1]) > 1e-5  # the other GELU is measured
    assert Path("m.gguf").is_file()


def test_without_llama_cpp_a_mismatch_is_refused(monkeypatch):
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    monkeypatch.setattr(gguf_layout, "_interleave_pairs", lambda weight, heads: weight)
    with pytest.raises(UserError, match="nothing was written"):
        export(source_of(random_model(arch="llama", qk_norm=False)))
    assert list(Path().iterdir()) == []


def test_bad_input_is_refused_before_work(monkeypatch):
    monkeypatch.setattr(gguf_export, "write_gguf", lambda *_: pytest.fail("work began"))
    Path("m.gguf").write_text("mine")
    with pytest.raises(UserError, match=r"m\.gguf: exists, and is no export of ours; choose another --out"):
        export(source_of(random_model()), overwrite=True)
    with pytest.raises(UserError, match="block_size = 1"):
        export(source_of(random_model(block_size=1)), out="other.gguf")
    assert Path("m.gguf").read_text() == "mine"


def test_a_full_disk_leaves_nothing():
    source = source_of(random_model())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(Failure, match=r"^m\.gguf: cannot be written \(the disk took only a part\); free some"):
            export(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert list(Path().iterdir()) == []


def test_only_an_earlier_export_is_replaced():
    from gguf import GGUFWriter

    write_gguf(random_model(), Bytes(), Path("m.gguf"), "q8_0", "m" * 255)
    with pytest.raises(UserError, match=r"m\.gguf: exists; replace it with --overwrite"):
        export(source_of(random_model()))
    export(source_of(random_model()), overwrite=True)
    assert read_gguf(Path("m.gguf")).config.n_embd == 64
    writer = GGUFWriter("m.gguf", "gpt2")  # somebody's model
    writer.add_name("losscurve.version")
    writer.add_description("downloaded for an hour")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    theirs = Path("m.gguf").read_bytes()
    for overwrite in (True, False):
        with pytest.raises(UserError, match=r"m\.gguf: exists, and is no export of ours; choose another --out"):
            export(source_of(random_model()), overwrite=overwrite)
    assert Path("m.gguf").read_bytes() == theirs


def test_what_the_format_cannot_hold_is_refused():
    model = random_model()
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight[3, 4] = 7e4
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight .* --dtype bfloat16"):
        export(source_of(model), "float16")
    with pytest.raises(UserError, match="200 tokens and its tokenizer 257"):
        export(source_of(random_model(vocab_size=200)))
    assert list(Path().iterdir()) == []


def test_the_commands_of_the_page(here, losscurve):
    """docs/elsewhere.md: the run is exported, and llama.cpp's server answers the request as the run would."""
    trained(config_for(here, out_dir="runs/mine", arch="llama", max_steps=4, tokenizer="byte", block_size=32))
    commands = re.search(r"```sh\n(losscurve export [^\n]*--to gguf .*?)```", PAGE, re.DOTALL)[1]
    line = commands.splitlines()[0].partition("#")[0].strip().removeprefix("losscurve ")
    code, out, _ = losscurve(line)
    assert code == 0
    assert out.endswith("wrote runs/mine.gguf (0.1 MiB)\nserve it with: llama-server -m runs/mine.gguf\n")
    code, _, err = losscurve("export runs/mine --to hf --dtype q8_0")
    assert (code, err) == (2, "error: dtype = q8_0: --to hf has float32, bfloat16, float16\n")
    if not llama_cpp.is_installed():
        return
    request = json.loads(re.search(r"/completion -d '(.*)'", commands)[1]) | {"n_predict": 20}
    with llama_cpp.llama_cpp(Path("runs/mine.gguf")) as reader:
        found = reader.ask("/completion", request)["content"]
    assert request["prompt"] + found == Run.open("runs/mine").sample(
        request["prompt"], 20, temperature=0, weights="best"
    )


# ---- there and back


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_model_comes_back_bit_for_bit(shape):
    model = random_model(**shape)
    write_gguf(model, Bytes(), Path("m.gguf"), "float32", "m")
    found = read_gguf(Path("m.gguf"))
    config = model.config
    if config.arch == "llama":  # their defaults are written out
        config = dataclasses.replace(config, ffn_dim=config.ffn_width, n_kv_head=config.kv_heads)
    assert found.config == config
    for name, weight in model.state_dict().items():
        assert torch.equal(found.weights[name], weight), name


@pytest.mark.parametrize(("tokenizer", "padding"), tokenizers(), ids=["byte", "bpe", "char"])
def test_a_tokenizer_comes_back(tokenizer, padding):
    write_gguf(bare_model(tokenizer, padding), tokenizer, Path("m.gguf"), "float32", "m")
    found = read_gguf(Path("m.gguf"))
    assert found.tokenizer.to_json() == tokenizer.to_json()
    assert found.config.vocab_size == tokenizer.vocab_size + padding


def test_a_truncated_or_damaged_file_is_one_line():
    write_gguf(random_model(n_layer=1), Bytes(), Path("m.gguf"), "q8_0", "m")
    content = Path("m.gguf").read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(30):
        damaged = bytearray(content[: draw.integers(len(content))])
        for place in draw.integers(min(len(damaged), 6000), size=3) if len(damaged) else ():
            damaged[place] ^= 1 << draw.integers(8)
        Path("damaged.gguf").write_bytes(damaged)
        with pytest.raises(UserError, match=r"^damaged\.gguf: ") as caught:
            read_gguf(Path("damaged.gguf"))
        assert "\n" not in str(caught.value)


def test_a_foreign_model_is_refused_by_name():
    from gguf import GGUFWriter

    writer = GGUFWriter("phi.gguf", "phi3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"phi\.gguf: .*architecture is 'phi3'; expected gpt2, llama or qwen3"):
        read_gguf(Path("phi.gguf"))
