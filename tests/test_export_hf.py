"""The export in Hugging Face's format: transformers opens it without our code; a mismatch leaves nothing."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, needs_gpt2, trained
from hub_server import serving
from safetensors import safe_open

from llm import storage
from llm.commands.export import path_for
from llm.config import from_settings
from llm.errors import UserError
from llm.export import huggingface
from llm.export.proof import HOSTILE
from llm.export.source import open_source
from llm.generate import generate
from llm.tokens import huggingface as tokenizer_json
from llm.tokens.bpe import BPE, gpt2, train_bpe
from llm.tokens.merges import merges
from llm.tokens.tokenizer import Bytes
from llm.weights import hf_config, hf_layout

transformers = pytest.importorskip("transformers")
SHAPES = {
    "gpt2, the chapter's": {"tokenizer": "byte"},
    "gpt2, as GPT-2": {"tied_lm_head": True, "bias": True, "gelu": "tanh", "tokenizer": "bpe", "vocab_size": 300},
    "gpt2, padded": {"ffn_mult": 2, "dropout": 0.1, "tokenizer": "char", "vocab_size": 64},
    "Llama": {"arch": "llama", "qk_norm": False, "n_kv_head": 1, "norm_eps": 1e-5, "tokenizer": "bpe"},
    "Qwen3": {"arch": "llama", "tied_lm_head": True, "head_dim": 12, "rope_theta": 500.0, "tokenizer": "byte"},
}


def train(settings):
    quick = SMALL | {"max_steps": 3, "eval_every": 3, "warmup_steps": 0, "sample_tokens": 0, "max_lr": 0.1}
    vocab = {"vocab_size": 300} if settings["tokenizer"] == "bpe" else {}
    trained(from_settings(quick | {"text": "text.txt", "out_dir": "run"} | vocab | settings))


@pytest.fixture
def run(here):
    train({"tokenizer": "byte"})
    return open_source(Path("run"), "hf")


def opened(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_opens_it_and_is_the_run(here, shape):
    train(SHAPES[shape])
    source = open_source(Path("run"), "hf")
    proof = huggingface.export(source, Path("hf"))
    theirs, tokenizer = opened("hf")
    assert type(theirs).__name__ == hf_config.KINDS[{"g": "gpt2", "L": "llama", "Q": "qwen3"}[shape[0]]]
    ours, ids = source.model, torch.from_numpy(source.validation[:16].astype(np.int64))[None]
    expected = ours(ids)[0]
    assert expected.std() > 0.02  # they are logits of something
    assert torch.allclose(theirs(ids).logits, expected, atol=1e-5)
    assert proof.validation_tokens > 100
    assert proof.export_loss == pytest.approx(proof.loss, abs=1e-5)
    # tokens, also those of what looks like a special one, and the settings of `generate`
    text = source.tokenizer.decode(source.validation)
    assert tokenizer(text)["input_ids"] == source.tokenizer.encode(text).tolist()
    assert tokenizer.eos_token_id == source.tokenizer.end_of_text == theirs.config.eos_token_id
    assert set(tokenizer(text)) == {"input_ids", "attention_mask"}  # GPT-2 would embed token types
    if tokenizer.eos_token_id is not None:
        assert tokenizer("<|endoftext|>")["input_ids"] == [tokenizer.eos_token_id]
    tokenizer.save_pretrained("saved")  # as after fine-tuning there: it is still ours
    saved = tokenizer_json.read(Path("saved/tokenizer.json").read_text(encoding="utf-8"), tokenizer.eos_token)
    assert saved.to_json() == source.tokenizer.to_json()
    settings = json.loads(Path("hf/tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]  # before version 5, others by default
    padding = list(range(source.tokenizer.vocab_size, ours.config.vocab_size))
    assert (theirs.generation_config.suppress_tokens or []) == padding
    start = ids[:, :4]
    drawn = theirs.generate(start, attention_mask=torch.ones_like(start), do_sample=False, pad_token_id=0)
    greedy = [int(token) for (token,) in generate(ours, start, 12, 0.0, vocab_size=source.tokenizer.vocab_size)]
    length = drawn.shape[1] - 4
    assert drawn[0, 4:].tolist() == greedy[:length]
    assert length == 12 or drawn[0, -1] == tokenizer.eos_token_id  # up to the context, which is 16


@pytest.mark.pictures
def test_the_command_writes_a_folder_that_is_complete(run, losscurve):
    code, out, err = losscurve("export run --to hf --dtype bfloat16")
    assert (code, err) == (0, "")
    assert "read back by transformers" in out
    assert "wrote run-hf/" in out
    names = {path.name for path in Path("run-hf").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"),
        *("README.md", "loss_curve.png", "schedule.png", "manifest.json"),
    }
    storage.verify_folder(Path("run-hf"))
    with safe_open("run-hf/model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    card = Path("run-hf/README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    for words in ("![Loss curve](<loss_curve.png>)", "## Data", "| n&#95;layer |", "in bfloat16", "hostile text"):
        assert words.replace("&#95;", "_") in card or words in card, words
    assert str(Path.cwd()) not in card
    assert losscurve("export run --to hf") == (
        2,
        "",
        "error: run-hf: exists; replace it with --overwrite, or choose another --out\n",
    )
    assert losscurve("export run --to hf --overwrite")[0] == 0
    Path("mine").mkdir()
    Path("mine/thesis.txt").touch()
    code, _, err = losscurve("export run --to hf --out mine --overwrite")
    assert (code, err) == (2, "error: mine: exists, and is no export of ours; choose another --out\n")
    assert Path("mine/thesis.txt").exists()


def test_an_export_lies_beside_a_run_that_is_typed_as_a_dot(tmp_path, monkeypatch):
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine")
    assert [path_for(run, ".gguf") for run in (".", "deep/..")] == 2 * [tmp_path / "mine.gguf"]
    assert [path_for(run, "-hf") for run in ("deep", "deep/")] == 2 * [Path("deep-hf")]


CHANGED = {
    "a note": (lambda: Path("run-hf/notes.txt").touch(), "run-hf/notes.txt: not in the manifest"),
    "a model that was tuned there": (
        lambda: Path("run-hf/model.safetensors").write_bytes(b"tuned"),
        "run-hf/model.safetensors: changed since it was written (SHA-256 differs)",
    ),
}


@pytest.mark.parametrize("what", CHANGED)
def test_an_export_that_somebody_changed_is_not_replaced(run, losscurve, what):
    huggingface.export(run, Path("run-hf"))
    change, words = CHANGED[what]
    change()
    before = {path: path.read_bytes() for path in Path("run-hf").iterdir()}
    code, _, err = losscurve("export run --to hf --overwrite")
    remedy = "--overwrite replaces only what export wrote; move run-hf away, or choose another --out"
    assert (code, err) == (2, f"error: {words}, and {remedy}\n")
    assert {path: path.read_bytes() for path in Path("run-hf").iterdir()} == before


def printed_difference(said):
    """The figure that every export prints under the same words."""
    return float(re.search(r" differ from the run's in float32 by at most (\S+) of the largest logit", said)[1])


def test_every_export_in_fewer_bits_prints_its_difference_from_the_run_in_float32(run, losscurve):
    rounded = huggingface.rounded(run.model, torch.bfloat16)
    ids = torch.from_numpy(run.validation[:512].astype(np.int64)).view(-1, 16)  # windows of the proof
    with torch.no_grad():
        ours, theirs = run.model(ids)[0], rounded(ids)[0]
    expected = ((theirs - ours).abs().amax((1, 2)) / ours.abs().amax((1, 2)).clamp(min=1)).max().item()
    code, out, err = losscurve("export run --to hf --dtype bfloat16")
    assert code == 0, err
    found = printed_difference(out)
    assert expected * 0.99 <= found < 5 * expected  # the hostile text and the last windows have their share
    aside = float(re.search(r"rounded as here by (\S+) \(bound 2e-05\)", out)[1])
    assert aside < 2e-5 < found
    pytest.importorskip("gguf")
    code, out, err = losscurve("export run --to gguf --dtype bfloat16")
    assert code == 0, err
    assert expected / 5 < printed_difference(out) < 10 * expected
    code, out, err = losscurve("export run --to html --dtype int8")
    assert code == 0, err
    assert printed_difference(out) > 2e-5
    assert "rounded as here by" in out


def nothing_left():
    return [path.name for path in Path().iterdir() if "hf" in path.name]


WRONG = {
    "the other GELU": lambda patch: patch.setattr(hf_config, "GELUS", {"exact": "gelu_new", "tanh": "gelu"}),
    "a matrix that is not transposed": lambda patch: patch.setattr(
        hf_layout, "TRANSPOSED", ("mlp.c_fc.weight", "mlp.c_proj.weight", "attn.c_attn.weight")
    ),
    "a token too many": lambda patch: patch.setattr(tokenizer_json, "write", wrong_tokenizer),
}


def wrong_tokenizer(tokenizer):
    content = json.loads(huggingface_write(tokenizer))
    content["pre_tokenizer"]["add_prefix_space"] = True
    return json.dumps(content)


huggingface_write = tokenizer_json.write


@pytest.mark.parametrize("wrong", WRONG)
def test_a_mismatch_is_refused_and_leaves_nothing(run, monkeypatch, wrong):
    huggingface.export(run, Path("right"))
    WRONG[wrong](monkeypatch)
    with pytest.raises(UserError, match=r"^the export('s logits differ| does not tokenize).*; nothing was written$"):
        huggingface.export(run, Path("hf"))
    assert nothing_left() == []


def test_a_full_disk_in_the_middle_leaves_nothing(run, monkeypatch, losscurve):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(storage, "write_text", full)
    code, _, err = losscurve("export run --to hf --out hf")
    assert code == 1
    assert err.startswith("error: hf: cannot be written (No space left on device); ")
    assert nothing_left() == []


def test_a_signal_in_the_middle_leaves_nothing(run, monkeypatch, losscurve):
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(huggingface, "read_back", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert losscurve("export run --to hf --out hf")[0] == 143
    assert nothing_left() == []
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize("to", ["hf", "gguf", "html"])
def test_a_folder_that_cannot_be_made_is_refused_before_work(run, losscurve, monkeypatch, to):
    monkeypatch.setattr("llm.export.huggingface._write_model", lambda *_: pytest.fail("work began"))
    monkeypatch.setattr("llm.export.gguf_export.write_gguf", lambda *_: pytest.fail("work began"))
    monkeypatch.setattr("llm.export.html.pack", lambda *_: pytest.fail("work began"))
    code, _, err = losscurve(f"export run --to {to} --out text.txt/out")
    assert (code, err) == (2, "error: text.txt: cannot write there (Not a directory); choose another folder\n")


@pytest.mark.parametrize("to", ["hf", "gguf", "html"])
def test_a_link_stays_and_what_it_leads_to_is_replaced(run, losscurve, to):
    assert losscurve(f"export run --to {to} --out folder/first")[0] == 0
    Path("link").symlink_to("folder/first")
    Path("nowhere").symlink_to("missing/first")
    before = sorted(Path().rglob("*"))
    code, _, err = losscurve(f"export run --to {to} --out link")
    assert (code, err) == (2, "error: link: exists; replace it with --overwrite, or choose another --out\n")
    code, _, err = losscurve(f"export run --to {to} --out nowhere --overwrite")
    assert (code, err) == (2, "error: nowhere: exists, and is no export of ours; choose another --out\n")
    code, _, err = losscurve(f"export run --to {to} --out nowhere/x")
    cause = "nowhere: leads to missing/first, which does not exist; make that folder, or choose another"
    assert (code, err) == (2, f"error: {cause}\n")
    old = Path("folder/first").stat().st_ino
    assert losscurve(f"export run --to {to} --out link --overwrite")[0] == 0
    assert Path("folder/first").stat().st_ino != old
    assert sorted(Path().rglob("*")) == before
    assert Path("link").is_symlink()


def test_without_transformers_it_is_read_back_by_us(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    proof = huggingface.export(run, Path("hf"))
    assert proof.reader == "losscurve itself (transformers is not installed)"
    monkeypatch.setattr(hf_config, "OUR_GELUS", {"gelu": "tanh"})
    with pytest.raises(UserError, match="logits differ"):
        huggingface.export(run, Path("other"))


def test_without_its_text_a_run_is_compared_on_the_hostile_one(run, losscurve):
    shutil.move(run.run.config.data_dir, "moved")
    code, out, err = losscurve("export run --to hf --out a")
    assert code == 0
    assert "on the hostile text only" in err
    assert "validation" not in out
    code, out, err = losscurve("export run --to hf --out b --data_dir moved")
    assert (code, err) == (0, "")
    assert "of validation text" in out
    assert losscurve("export run --to hf --out c --data_dir nowhere")[0] == 2


def test_the_bound_holds_for_what_is_not_a_number(run):
    broken = dataclasses.replace(run, model=huggingface.rounded(run.model, torch.float32))
    with torch.no_grad():
        broken.model.ln_f.weight[0] = torch.nan
    with pytest.raises(UserError, match="logits differ from the run's by nan"):
        huggingface.export(broken, Path("hf"))
    assert nothing_left() == []


@pytest.mark.parametrize("push", ["someone/small-model", "small-model"])
def test_push_uploads_the_folder(run, losscurve, monkeypatch, push):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        code, out, err = losscurve(f"export run --to hf --out hf --push {push}")
        assert code == 0, err
        assert f"uploaded to {hub.address}/someone/small-model" in out
        files = {path.name: path.read_bytes() for path in Path("hf").iterdir() if path.name != "manifest.json"}
        assert hub.models["someone/small-model"] == files
        assert hub.private == {"someone/small-model": True}
        hub.down = 500
        code, _, err = losscurve(f"export run --to hf --out other --push {push}")
        assert code == 1
        assert "not uploaded to" in err
        assert "hf upload" in err
        assert len(err.splitlines()) == 1
        storage.verify_folder(Path("other"))


# ---- tokenizers alone

RANDOM = np.random.default_rng(0)
TANGLED = ["a" * 3000, "aab " * 1000, "== === " * 300, "".join(HOSTILE) * 10, "aaaa aaa\n\n\n" * 300]


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "byte"])
def test_a_byte_level_tokenizer_is_the_same_on_any_text(kind, request):
    if kind == "gpt2":
        request.applymarker(needs_gpt2)
    ours = {"gpt2": lambda: gpt2(offline=True), "bpe": lambda: train_bpe(TANGLED, 600), "byte": Bytes}[kind]()
    theirs = tokenizer_json.HuggingFace(tokenizer_json.write(ours), ours.end_of_text)
    letters = list("".join(HOSTILE)) + list("aab \n=") * 40
    texts = ["".join(RANDOM.choice(letters, RANDOM.integers(1, 60))) for _ in range(500)]
    for text in [*HOSTILE, *texts]:
        assert theirs.encode(text).tolist() == ours.encode(text).tolist(), text
    assert theirs.tokens == ours.tokens


def test_every_way_to_cut_a_token_is_a_merge():
    tokens = [*(bytes([i]) for i in range(256)), b"ab", b"bc", b"abc"]
    assert merges(BPE(tokens)) == [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")]
