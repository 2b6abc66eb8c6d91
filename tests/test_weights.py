"""Weights as other programs write them: loaded where only names or wrappings differ, else named with a remedy."""

import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import flags, needs_gpt2, run_python
from safetensors.torch import save_file

from llm.config import GPTConfig
from llm.errors import UserError
from llm.model import GPT
from llm.weights import load_model, open_weights, read_weights, weights_file

CONFIG = GPTConfig(vocab_size=50, block_size=8, n_layer=2, n_head=2, n_embd=8, bias=True)
BASE = GPTConfig(n_head=2)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return GPT(CONFIG).state_dict()


def prefixed(weights, prefix):
    return {f"{prefix}{name}": value for name, value in weights.items()}


def refusal(path="w.pt"):
    with pytest.raises(UserError) as caught:
        read_weights(Path(path), BASE)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert ";" in message or ": python -c" in message  # there is a remedy
    return message


SAVED = {
    "torch.compile": lambda w: prefixed(w, "_orig_mod."),
    "DDP": lambda w: prefixed(w, "module."),
    "DDP, compiled": lambda w: prefixed(w, "module._orig_mod."),
    "compiled, DDP": lambda w: prefixed(w, "_orig_mod.module."),
    "in a module of someone": lambda w: prefixed(w, "model."),
    "model": lambda w: {"model": w, "optimizer": {"state": {}}, "step": 3, "loss": torch.tensor(2.0)},
    "state_dict": lambda w: {"epoch": 3, "state_dict": prefixed(w, "model.")},
    "model_state_dict": lambda w: {"epoch": 3, "model_state_dict": w, "optimizer_state_dict": {}},
    "one in another": lambda w: {"model": {"state_dict": prefixed(w, "module.")}},
    "nanoGPT with biases": lambda w: {"model": prefixed(w, "_orig_mod.transformer."), "model_args": {"n_head": 2}},
}


@pytest.mark.parametrize("program", SAVED)
def test_other_names_and_wrappings_load(weights, program):
    torch.save(SAVED[program](weights), "w.pt")
    config, found = read_weights(Path("w.pt"), BASE)
    assert config == CONFIG
    assert list(found) == list(weights)
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_the_head_of_nanogpt_has_no_prefix_and_its_heads_are_told(weights):
    head = weights.pop("lm_head.weight")
    model = prefixed(weights, "transformer.") | {"lm_head.weight": head}
    torch.save({"model": model, "model_args": {"n_head": 4, "n_layer": 2}}, "w.pt")
    assert read_weights(Path("w.pt"), BASE)[0].n_head == 4


def test_a_tied_head_stays_tied(tmp_path):
    model = GPT(GPTConfig(vocab_size=50, block_size=8, n_layer=1, n_head=2, n_embd=8, tied_lm_head=True))
    torch.save({"state_dict": prefixed(model.state_dict(), "_orig_mod.")}, tmp_path / "w.pt")
    assert read_weights(tmp_path / "w.pt", BASE)[0].tied_lm_head
    ids = torch.arange(8)[None]
    loaded = load_model(tmp_path / "w.pt", torch.device("cpu"), BASE)
    assert torch.equal(loaded(ids)[0], model.eval()(ids)[0])


@needs_gpt2
def test_what_torch_compile_saved_can_be_sampled_and_trained_on(here, losscurve):
    config = GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=16)
    torch.save({"model": prefixed(GPT(config).state_dict(), "_orig_mod.")}, "w.pt")
    assert losscurve("sample --checkpoint w.pt --n_head 2 --max_new_tokens 3 --prompt a")[0] == 0
    train = flags(tokenizer="auto", n_layer=1, n_embd=8, max_steps=2, warmup_steps=0)
    assert losscurve(f"train --init_from w.pt --text text.txt {train}")[0] == 0


@needs_gpt2
def test_heads_that_do_not_divide_the_width_get_a_flag_that_works(here, losscurve):
    torch.save(GPT(GPTConfig(n_layer=1, n_head=3, n_embd=9, block_size=16)).state_dict(), "w.pt")
    sample = "sample --checkpoint w.pt --max_new_tokens 3 --prompt a"
    code, _, err = losscurve(sample)
    assert code == 2
    assert "w.pt: is 9 channels wide, which 4 heads do not divide" in err
    assert losscurve(f"{sample} {re.search('--n_head 3', err)[0]}")[0] == 0


@needs_gpt2
def test_heads_are_typed_for_a_state_dict_of_any_name_and_refused_where_a_file_tells_them(here, losscurve):
    torch.manual_seed(0)
    weights = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=16)).state_dict()
    sample = "--max_new_tokens 3 --prompt a"
    for name in ("w.pt", "w.pth"):
        torch.save(weights, name)
        assert losscurve(f"sample --checkpoint {name} --n_head 2 {sample}")[0] == 0
    torch.save({"model": prefixed(weights, "transformer."), "model_args": {"n_head": 2}}, "ckpt.pt")
    assert losscurve(f"sample --checkpoint ckpt.pt {sample}")[0] == 0
    code, _, err = losscurve(f"sample --checkpoint ckpt.pt --n_head 4 {sample}")
    assert (code, "ckpt.pt has its own, so leave them out" in err) == (2, True)


class Thing:
    pass


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1], "holds a list and no weights"),
        (torch.zeros(3), "holds a Tensor and no weights"),
        ({}, "has no wte.weight (its names: none"),
        ({"model": {}}, "has no wte.weight"),
        ({"model": 3}, "has no wte.weight (its names: 'model'"),
        ({"encoder.weight": torch.zeros(3)}, "has no wte.weight (its names: 'encoder.weight'"),
        (Thing(), "holds Python objects (test_weights.Thing) besides weights"),
        (torch.nn.Linear(2, 2), "holds Python objects (torch.nn.modules.linear.Linear)"),
    ],
)
def test_what_is_no_weights_is_named(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "w.pt")
    message = refusal()
    assert words in message
    assert "torch.save(model.state_dict(), " in message


def test_a_dict_in_itself_ends(weights):
    content = {}
    content["model"] = content
    torch.save(content, "w.pt")
    assert "has no wte.weight" in refusal()


def test_a_name_too_many_or_too_few(weights):
    torch.save(weights | {"h.0.extra": torch.zeros(2)}, "w.pt")
    assert "has h.0.extra, which a GPT of ours of this shape has not" in refusal()
    torch.save(weights | {"step": 3}, "w.pt")
    assert "has step, which" in refusal()
    del weights["ln_f.bias"]
    torch.save(weights, "w.pt")
    assert "has no ln_f.bias, which a GPT of ours of this shape needs" in refusal()
    torch.save(weights | {"ln_f.bias": torch.zeros(3)}, "w.pt")
    assert "ln_f.bias is (3,), and this shape needs (8,)" in refusal()


def arrays(weights):
    return {name: value.numpy() for name, value in weights.items()}


def zipped(weights):
    np.savez("w.npz", **arrays(weights))
    Path("w.npz").rename("w.pt")


FILES = {
    "is empty": lambda w: Path("w.pt").touch(),
    "is a Git LFS pointer": lambda w: Path("w.pt").write_text("version https://git-lfs.github.com/spec/v1\noid 0\n"),
    "is a web page": lambda w: Path("w.pt").write_text("<!DOCTYPE html><html></html>"),
    "is a text": lambda w: Path("w.pt").write_text("these are not the weights"),
    "is a pickle that torch.save did not write": lambda w: Path("w.pt").write_bytes(pickle.dumps(arrays(w))),
    "is a gzip file": lambda w: Path("w.pt").write_bytes(b"\x1f\x8b\x08\0" * 9),
    "is a zip archive, but not one of torch.save": zipped,
    "not a state_dict saved by torch.save": lambda w: Path("w.pt").write_bytes(b"\xff" * 99),
}


@pytest.mark.parametrize("words", FILES)
def test_a_file_that_is_none_of_torch_is_named(weights, words):
    FILES[words](weights)
    assert words in refusal()


def test_torchscript_is_named_and_not_run(weights):
    torch.save(weights, "w.pt")
    with zipfile.ZipFile("w.pt", "a") as archive:  # torch takes what has this in it for a program
        archive.writestr("w/constants.pkl", b"")
    assert "is TorchScript, which is a program" in refusal()


PARTS = {
    "model/model.safetensors": "model",
    "model/model-00001-of-00002.safetensors": "model",
    "model/model.safetensors.index.json": "model",
    "model/pytorch_model.bin": "model",
    "model/config.json": "model",
    "model/tokenizer.json": "model",
    "run/tokenizer.json": "run",
    "run/step-000500/model.safetensors": "run",
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_model_leads_to_its_folder(weights, part):
    for name in (*PARTS, "run/step-000500/state.json", "run/config.toml"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    with pytest.raises(UserError) as caught:
        open_weights(part, BASE)
    assert str(caught.value) == f"{part}: is only a part of a model; give the folder of all its files: {PARTS[part]}"


def test_a_file_beside_a_foreign_config_that_is_whole_is_read(weights):
    Path("config.json").touch()  # of any program
    torch.save(weights, "w.pt")
    assert weights_file("w.pt") == Path("w.pt")
    Path("empty").mkdir()
    with pytest.raises(UserError, match=r"^empty: no weights in this folder"):
        weights_file("empty")
    Path("empty/model.safetensors").touch()
    with pytest.raises(UserError, match=r"^empty: has safetensors files, but no config\.json with their shape; copy"):
        weights_file("empty")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_file_that_is_cut_off(weights, share):
    torch.save(weights, "w.pt")
    content = Path("w.pt").read_bytes()
    Path("w.pt").write_bytes(content[: int(share * len(content))])
    assert "is cut off or damaged" in refusal()


@pytest.mark.parametrize(
    ("save", "words"),
    [
        (lambda w, path: torch.save(w, path, _use_new_zipfile_serialization=False), "before PyTorch 1.6"),
        (lambda w, path: save_file({name: v.clone() for name, v in w.items()}, path), "is a safetensors file"),
    ],
)
def test_older_and_other_formats_get_a_command_that_works(weights, save, words):
    Path("a folder").mkdir()
    save(weights, "a folder/w.pt")
    message = refusal("a folder/w.pt")
    assert words in message
    run_python(message[message.index("python -c") :])
    found = read_weights(Path("a folder/w.new.pt"), BASE)[1]
    assert all(torch.equal(found[name], value) for name, value in weights.items())
