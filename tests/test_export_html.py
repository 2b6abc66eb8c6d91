"""The export as an HTML file: the page's scripts, run by Node, are the run; a mismatch leaves nothing."""

import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, needs_gpt2, trained

from llm.arch import make_model
from llm.commands.export import main
from llm.config import GPTConfig, from_settings
from llm.errors import Failure, UserError
from llm.export import html
from llm.export.browser import read_back
from llm.export.browser.assemble import assemble
from llm.export.browser.pack import Packed, load, pack, unpack
from llm.export.proof import HOSTILE
from llm.export.source import open_source
from llm.generate import generate, next_probabilities, penalise, tokens_in
from llm.report.gather import gather
from llm.tokens.bpe import BPE, gpt2
from llm.tokens.writing import Writing

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="no node here")
SHAPES = {  # odd sizes, since the page pads with zeros; windows longer and shorter than a chunk of the page
    "gpt2, the chapter's": {"n_embd": 18, "n_head": 6, "block_size": 40, "tokenizer": "byte"},
    "gpt2, as GPT-2": {"tied_lm_head": True, "bias": True, "gelu": "tanh", "tokenizer": "bpe", "vocab_size": 301},
    "gpt2, padded": {"n_embd": 15, "n_head": 3, "ffn_mult": 3, "tokenizer": "char", "vocab_size": 66},
    "Llama": {"arch": "llama", "qk_norm": False, "n_head": 4, "n_kv_head": 2, "norm_eps": 1e-3, "tokenizer": "bpe"},
    "Qwen3": {"arch": "llama", "tied_lm_head": True, "head_dim": 6, "block_size": 40, "tokenizer": "byte"},
}


def train(settings):
    quick = SMALL | {"max_steps": 3, "eval_every": 3, "warmup_steps": 0, "sample_tokens": 0, "max_lr": 0.1}
    vocab = {"vocab_size": 300} if settings["tokenizer"] == "bpe" else {}
    trained(from_settings(quick | {"text": "text.txt", "out_dir": "run"} | vocab | settings))
    return open_source(Path("run"), "html")


@pytest.fixture
def run(here):
    return train({"tokenizer": "byte"})


def greedy(model, prompt, count, vocab_size):
    tokens = generate(model, torch.tensor([prompt]), count, temperature=0.0, vocab_size=vocab_size)
    return [int(token) for (token,) in tokens]


def disturb(model, prompt, vocab_size):
    """Draw weights with which the likeliest tokens vary: after a few steps of training they do not."""
    for seed in range(20):
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() == 1:
                    p.add_(torch.randn_like(p), alpha=0.1)  # norms and biases
                else:
                    p.normal_(0, 0.7 if name.startswith("h.") else 1.0)
        if len(set(greedy(model, prompt, 90, vocab_size)[-45:])) > 9:
            return
    raise AssertionError("every model repeats itself")


@needs_node
@pytest.mark.parametrize("shape", SHAPES)
def test_the_page_draws_what_the_run_draws_past_its_window_too(here, shape):
    source = train(SHAPES[shape])
    block_size, V = source.model.config.block_size, source.tokenizer.vocab_size
    prompts = [source.validation[:length].tolist() for length in (3, block_size + 5)]
    disturb(source.model, prompts[1], V)
    made = html.export(source, Path("model.html"), "float32")
    assert made.proof.validation_tokens > 100
    assert made.proof.difference < 2e-5
    assert "Node" in made.proof.reader
    for flags in ((), ("slow",)):  # with the kernel, and without it
        with read_back.ask_node(NODE, Path("model.html"), *flags) as ask:
            for prompt in prompts:
                assert ask(greedy=prompt, count=90)["ids"] == greedy(source.model, prompt, 90, V)


def test_comments_are_left_out_and_no_string():
    for name in (*html.ENGINE, "page.js"):
        script = html._read(name)
        for line in script.splitlines():
            code, mark, _ = line.partition("// ")
            if mark:
                assert not code.strip() or code[-1] == " "
                assert all(code.count(quote) % 2 == 0 for quote in "\"'`"), line
                assert html.smaller(line).replace(" ", "") == code.replace(" ", "")
    assert html.smaller("  a = { b: c - -d + +e }; // f") == "a={b:c - -d + +e};"
    for kept in ('a = "b = c";', "const a = / ?b/u.test(c);", "a = b / c;"):
        assert html.smaller(kept) == kept


@needs_node
@pytest.mark.parametrize("size", range(6))
def test_base85_is_read_as_it_was_written(size, tmp_path):
    content = np.random.default_rng(size).integers(0, 256, 997 + size, dtype=np.uint8).tobytes()
    (part,) = html._in_base85(content)
    assert not set("<\"'\\ \n") & set(part)
    script = html._read("load.js") + "process.stdout.write(Buffer.from(fromBase85(process.argv[1])).toString('hex'));"
    done = subprocess.run([NODE, "-e", script, part], capture_output=True, text=True, check=True)
    assert bytes.fromhex(done.stdout) == zlib.compress(content, 9)


@needs_node
@needs_gpt2
def test_the_page_has_gpt2s_tokens(here):
    tokenizer = gpt2(offline=True)
    source = train({"tokenizer": "byte"})
    model = make_model(dataclasses.replace(source.model.config, vocab_size=tokenizer.vocab_size, n_embd=4)).eval()
    source = dataclasses.replace(source, tokenizer=tokenizer, model=model, validation=np.zeros(0, int))
    long = "antidisestablishment" * 40 + "\u0085\ufeff \u2003x" + "é" * 300 + "a \u0085b \ufeffc"
    page = html.page(source, gather(Path("run"), memorised=False), pack(model, "int8"), None)
    Path("model.html").write_text(page, encoding="utf-8")
    with read_back.ask_node(NODE, Path("model.html")) as ask:
        for text in (*HOSTILE, long):
            assert ask(encode=text)["ids"] == tokenizer.encode(text).tolist()
        with pytest.raises(UserError, match="lone surrogate"):
            ask(encode="\ud800")


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_rounded_weights_are_the_nearest(dtype):
    torch.manual_seed(0)
    model = make_model(GPTConfig(vocab_size=7, block_size=5, n_layer=1, n_head=1, n_embd=6))
    with torch.no_grad():
        model.wte.weight[3] = 0  # its scale is 0
    found = unpack(pack(model, dtype))
    assert list(found) == [name for name, _ in model.named_parameters()]
    for name, weight in model.named_parameters():
        rounded = found[name].view(weight.shape)
        if weight.dim() == 1:
            assert torch.equal(rounded, weight)
        elif dtype == "float16":
            assert torch.equal(rounded, weight.half().float())
        else:
            steps = weight.abs().amax(1, keepdim=True) / 127
            assert bool(((rounded - weight).abs() <= steps / 2 * 1.001).all())
            assert bool((rounded.abs().amax(1) == weight.abs().amax(1)).float().mean() > 0.4)  # the whole range is used


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_page_with_rounded_weights_says_what_that_costs(run, dtype):
    made = html.export(run, Path("model.html"), dtype)
    assert made.quality.tokens == len(run.validation) - 1
    assert made.quality.run != made.quality.export
    assert made.quality.export == pytest.approx(made.quality.run, rel=0.01)
    page = Path("model.html").read_text(encoding="utf-8")
    assert f"{made.quality.export:.4f} bits per byte with the weights as {dtype}" in page
    about, content = read_back.read_file(Path("model.html"))
    rounded = make_model(run.model.config).eval()
    load(rounded, unpack(Packed(dtype, about["shapes"], content)))
    assert about["dtype"] == dtype
    if NODE:
        prompt = run.validation[:5].tolist()
        with read_back.ask_node(NODE, Path("model.html")) as ask:
            assert ask(greedy=prompt, count=30)["ids"] == greedy(rounded, prompt, 30, 257)


KNOBS = [
    (1, 0, 1),
    (0.7, 0, 1),
    (0, 0, 1),
    (1.5, 10, 1),
    (1, 300, 1),
    (1, 0, 0.9),
    (2, 40, 0.5),
    (1, 0, 0.3),
    (1, 0, 0.001),
    (1, 0, 1, 0.1),
    (1.3, 0, 0.9, 0.05),
    (1, 50, 0.8, 0.2, 1.5),
    (1, 0, 1, 0, 0.7),
    (0, 0, 1, 0.5, 4),
]


@needs_node
@pytest.mark.parametrize("spread", [3.0, 0.1])
def test_the_page_draws_from_the_same_tokens_with_the_same_probabilities(run, spread):
    html.export(run, Path("model.html"))
    torch.manual_seed(0)
    logits = spread * torch.randn(1, 900)
    with read_back.ask_node(NODE, Path("model.html")) as ask:
        for knobs in KNOBS:
            temperature, top_k, top_p, min_p, penalty = knobs + (0, 1)[len(knobs) - 3 :]
            seen = [logits[0].argmax().item(), 3, 3, 899]
            answer = ask(candidates=[logits[0].tolist(), *knobs[:4]], seen=seen, penalty=penalty)
            weighed = penalise(logits, tokens_in(torch.tensor([seen]), 900), penalty)
            expected = next_probabilities(weighed, temperature, top_k or None, top_p, min_p)[0]
            found = torch.zeros(900)
            ids = range(900) if answer["ids"] is None else answer["ids"]
            values = answer["probabilities"]
            listed = values if isinstance(values, list) else list(values.values())  # JSON of a typed array
            found[list(ids)] = torch.tensor(listed, dtype=torch.float32)
            assert torch.allclose(found, expected, atol=1e-6), knobs


@needs_node
def test_the_page_stops_where_sample_stops(here):
    source = train({"tokenizer": "bpe"})
    html.export(source, Path("model.html"), "int8")
    draw, ends = np.random.default_rng(0), []
    with read_back.ask_node(NODE, Path("model.html")) as ask:
        for _ in range(100):
            ids = draw.integers(0, source.tokenizer.vocab_size - 1, 40).tolist()  # much of it is no UTF-8
            text = source.tokenizer.decode(ids)
            places = draw.integers(0, len(text) - 4, 3)
            stops = [text[place : place + draw.integers(1, 4)] for place in places]
            lines = [stop.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t") for stop in stops]
            writing, shown, count = Writing(source.tokenizer, stops), "", 0
            while not writing.ended:
                shown += writing.add(ids[count])
                count += 1
            assert ask(write=ids, stops="\n".join([*lines, ""])) == {"text": shown, "count": count}
            ends.append(count)
        assert ask(write=[], stops="") == {"text": "", "count": 0}
    assert len(set(ends)) > 10


@needs_node
@pytest.mark.parametrize(
    ("script", "right", "wrong", "words"),
    [
        ("model.js", "LAYER_NORM = 1e-5", "LAYER_NORM = 1e-2", "logits differ"),
        ("tokenizer.js", "new TextEncoder().encode(text)]", "new TextEncoder().encode(text.trim())]", "not tokenize"),
        ("load.js", "numbers[i] * scales[row]", "missing", "Node could not open"),
    ],
)
def test_a_page_that_is_not_the_run_is_refused_and_leaves_nothing(run, monkeypatch, script, right, wrong, words):
    read = html._read
    assert right in read(script)
    monkeypatch.setattr(html, "_read", lambda name: read(name).replace(right, wrong) if name == script else read(name))
    with pytest.raises(UserError, match=words):
        html.export(run, Path("model.html"), "float32")
    assert list(Path().glob("*model.html*")) == []


@needs_node
@pytest.mark.parametrize(("right", "wrong"), [("\\\\x85", ""), ('u3000"', 'u3000\\\\ufeff"')])
def test_other_white_space_than_the_runs_is_refused(here, monkeypatch, right, wrong):
    source = train({"tokenizer": "byte", "vocab_size": 259})
    bytes_and_two = [*(bytes([i]) for i in range(256)), b" \xc2", b" \xef"]  # a space with half of U+0085, of U+FEFF
    source = dataclasses.replace(source, tokenizer=BPE(bytes_and_two))
    html.export(source, Path("model.html"), "int8")
    read = html._read
    assert read("tokenizer.js").count(right) == 1
    monkeypatch.setattr(html, "_read", lambda name: read(name).replace(right, wrong))
    with pytest.raises(UserError, match=r"^the export does not tokenize .*; nothing was written$"):
        html.export(source, Path("other.html"), "int8")
    assert not Path("other.html").exists()


def test_without_node_our_own_reader_compares(run, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    made = html.export(run, Path("model.html"), "int8")
    assert "our own reader, which runs none of the page's scripts (Node is not installed)" in str(made)
    pages = html.page

    def damaged(source, report, packed, quality):
        return pages(source, report, dataclasses.replace(packed, content=packed.content[:-1]), quality)

    monkeypatch.setattr(html, "page", damaged)
    with pytest.raises(UserError, match="another size"):
        html.export(run, Path("other.html"), "int8")
    assert not Path("other.html").exists()


def test_what_exists_is_replaced_only_if_asked_to_and_if_it_is_an_export(run):
    html.export(run, Path("model.html"), "int8")
    with pytest.raises(UserError, match="--overwrite"):
        html.export(run, Path("model.html"))
    html.export(run, Path("model.html"), overwrite=True)
    for theirs in ("<h1>mine</h1>", f"<!DOCTYPE html>\n<!-- how to read {html.MARK} -->"):
        Path("mine.html").write_text(theirs)
        with pytest.raises(UserError, match="no export of ours"):
            html.export(run, Path("mine.html"), overwrite=True)
        assert Path("mine.html").read_text() == theirs


def test_a_full_disk_leaves_nothing(run):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(Failure, match=r"model\.html: .* bytes cannot be written"):
            html.export(run, Path("model.html"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert list(Path().glob("*model.html*")) == []


def test_what_a_page_cannot_hold_is_refused(run, monkeypatch):
    with torch.no_grad():
        run.model.wte.weight[0, 0] = 1e5
    with pytest.raises(UserError, match=r"wte\.weight .*int8"):
        html.export(run, Path("model.html"))
    monkeypatch.setattr(html, "LARGEST", 1000)
    with pytest.raises(UserError, match="room for 1,000"):
        html.export(run, Path("model.html"), "int8")
    with pytest.raises(UserError, match="bfloat16"):
        main(["run", "--to", "html", "--dtype", "bfloat16"])


@needs_node
def test_the_kernel_is_a_module_of_webassembly(tmp_path):
    text = html._read("kernel.wat")
    (tmp_path / "kernel.wasm").write_bytes(assemble(text))
    script = """
    const found = new WebAssembly.Module(require("fs").readFileSync(process.argv[1]));
    console.log(JSON.stringify([WebAssembly.Module.imports(found), WebAssembly.Module.exports(found)]));"""
    done = subprocess.run([NODE, "-e", script, tmp_path / "kernel.wasm"], capture_output=True, text=True, check=True)
    imports, exports = json.loads(done.stdout)
    assert imports == [{"module": "page", "name": "memory", "kind": "memory"}]
    assert exports == [{"name": "multiply", "kind": "function"}]
    with pytest.raises(UserError, match=r"f32x4\.div"):
        assemble(text.replace("f32x4.mul", "f32x4.div"))


@pytest.mark.skipif(shutil.which("wat2wasm") is None, reason="no wat2wasm (Debian's wabt) here")
def test_the_kernel_is_assembled_as_by_wabt(tmp_path):
    text = html._read("kernel.wat")
    (tmp_path / "kernel.wat").write_text(text)
    subprocess.run(["wat2wasm", "kernel.wat"], cwd=tmp_path, check=True)
    assert (tmp_path / "kernel.wasm").read_bytes() == assemble(text)
