"""`evaluate`: the figures of a run's record, and those that transformers gives the same weights on the same text."""

import io
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rich.progress
import torch
import torch.nn.functional as F
from conftest import config_for, trained, words
from safetensors.torch import load_file, save_file

from llm.commands import bars
from llm.export.gguf_file import write_gguf
from llm.record.metrics import losses, read_record
from llm.run import Run
from llm.storage.files import read_json
from llm.tokens import huggingface
from llm.weights.hf_config import settings_out
from llm.weights.hf_layout import weights_out


@pytest.fixture
def scores(losscurve):
    """Run `evaluate … --json`, and return its array."""

    def run(line):
        code, out, err = losscurve(f"evaluate {line} --json")
        assert code == 0, err
        return json.loads(out)

    return run


def test_without_a_text_the_figures_are_those_of_the_record(here, scores):
    trained(config_for(here, max_steps=12, eval_every=4, max_lr=1.0, min_lr=0.5, eval_tokens=64))
    rows = {row["step"]: row for row in read_record(Path("checkpoints")) if row["split"] == "val"}
    by_loss = dict(sorted(losses(list(rows.values()), "val")))
    best = min(by_loss, key=by_loss.get)
    assert best != 12
    for weights, step in (("best", best), ("last", 12)):
        (found,) = scores(f"--weights {weights}")
        assert found["loss"] == rows[step]["loss"]
        assert found["bits_per_byte"] == rows[step]["bits_per_byte"]
        assert found["tokens"] == 64
        assert found["text"] == "validation split of text"
        assert found["bytes"] == pytest.approx(found["loss"] * 64 / math.log(2) / found["bits_per_byte"])


def write_hf(run, folder):
    """The run as a folder of transformers, without the export's proof."""
    model, tokenizer = run.model("last", "cpu"), run.tokenizer
    Path(folder).mkdir()
    save_file(weights_out(model.config, model.state_dict()), Path(folder, "model.safetensors"))
    Path(folder, "config.json").write_text(json.dumps(settings_out(model.config)))
    Path(folder, "tokenizer.json").write_text(huggingface.write(tokenizer), encoding="utf-8")
    Path(folder, "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


@pytest.mark.parametrize(
    "shape", [{"tokenizer": "byte", "gelu": "tanh"}, {"tokenizer": "bpe", "vocab_size": 300, "arch": "llama"}]
)
def test_every_format_of_one_model_has_the_same_figures(here, scores, shape):
    pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    trained(config_for(here, max_steps=6, eval_every=6, **shape))
    run, text = Run.open("checkpoints"), words(150, seed=3) + "Überraschung 🙂\n"
    Path("other.txt").write_text(text, encoding="utf-8")
    write_hf(run, "hf")
    for dtype in ("float32", "q8_0"):
        write_gguf(run.model("last", "cpu"), run.tokenizer, Path(f"{dtype}.gguf"), dtype, "m")
    Path("copy").mkdir()
    shutil.copy("checkpoints/model.pt", "copy/bare.pt")
    shutil.copy("checkpoints/tokenizer.json", "copy")
    ids = run.tokenizer.encode(text).astype(np.int64)
    theirs = transformers.AutoModelForCausalLM.from_pretrained("hf").eval()
    for flags, stride in (("", 16), ("--stride 5", 5)):
        expected = nats_of(theirs, ids, 16, stride)
        line = f"checkpoints hf float32.gguf q8_0.gguf --text other.txt {flags}"
        found = scores(f"{line} --weights last")
        assert [row["weights"] for row in found[1:4]] == ["hf", "float32.gguf", "q8_0.gguf"]
        for row in found:
            assert row["tokens"] == len(ids) - 1
            assert row["bytes"] == len(text.encode()) - len(run.tokenizer.decode_bytes(ids[:1]))
            exact = "q8_0" not in row["weights"]
            assert row["loss"] == pytest.approx(expected / row["tokens"], rel=1e-6 if exact else 1e-2)
            assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
            assert row["bits_per_byte"] == pytest.approx(row["loss"] * row["tokens"] / math.log(2) / row["bytes"])
        assert found[0]["loss"] != found[3]["loss"]
    assert found[0]["stride"] == 5
    if "arch" not in shape:
        (bare,) = scores("copy/bare.pt --n_head 2 --gelu tanh --text other.txt --stride 5")
        assert bare["loss"] == found[0]["loss"]


@torch.no_grad()
def nats_of(model, ids, window, stride):
    """The sum over all tokens, by the recipe of transformers' page on perplexity, with logits of transformers."""
    total, done = 0.0, 0
    for begin in range(0, len(ids) - 1, stride):
        end = min(begin + window, len(ids) - 1)
        logits = model(torch.from_numpy(ids[begin:end])[None]).logits[0].double()
        nats = F.cross_entropy(logits, torch.from_numpy(ids[begin + 1 : end + 1]), reduction="none")
        total += nats[done - begin :].sum().item()
        done = end
        if end == len(ids) - 1:
            return total
    raise AssertionError


def test_documents_are_apart_and_a_table_shows_it(here, losscurve):
    trained(config_for(here, tokenizer="byte", max_steps=4, eval_every=4))
    rows = ({"text": text} for text in ("", "ab", "", "", "cde", ""))  # the empty ones are skipped
    Path("a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    code, out, err = losscurve("evaluate checkpoints --text a.jsonl")
    assert (code, err) == (0, "")
    title, row = out.splitlines()
    assert re.split("  +", title.strip())[2:5] == ["nats/token", "perplexity", "bits/byte"]
    cells = row.split()
    assert cells[:2] == ["checkpoints/best.pt", "a.jsonl"]
    assert cells[5:] == ["5", "4", "16", "float32"]  # b, end-of-text, c, d, e
    assert float(cells[3].replace(",", "")) == pytest.approx(math.exp(float(cells[2])), rel=1e-3)


@pytest.mark.parametrize("shape", [{"gelu": "tanh"}, {"arch": "llama", "tied_lm_head": True}])
def test_a_checkpoint_is_evaluated_as_its_row_of_the_record(here, scores, losscurve, shape):
    trained(config_for(here, max_steps=8, eval_every=4, save_every=4, **shape))
    rows = {row["step"]: row["loss"] for row in read_record(Path("checkpoints")) if row["split"] == "val"}
    found = scores("checkpoints/step-000004 checkpoints/step-000008/")
    assert [row["loss"] for row in found] == [rows[4], rows[8]]
    last = "--prompt ab --seed 1 --max_new_tokens 20"
    state, run = (losscurve(f"sample {of} {last}")[1] for of in ("--checkpoint checkpoints/step-000008", ""))
    assert state == run != ""
    code, _, err = losscurve("sample --out_dir checkpoints/step-000004")
    assert (code, err.partition("; ")[0]) == (2, "error: checkpoints/step-000004: a checkpoint and no run")
    assert losscurve(f"sample {err.rpartition(' with ')[2]} --prompt a")[0] == 0  # the remedy works when pasted
    shutil.copytree("checkpoints/step-000004", "step-000004")
    assert losscurve("evaluate step-000004")[2].startswith("error: step-000004: a checkpoint outside its run; copy ")
    with open("checkpoints/step-000004/model.safetensors", "r+b") as file:
        file.seek(500)
        file.write(b"damage")
    code, _, err = losscurve("evaluate checkpoints/step-000004")
    assert code == 2
    assert "changed since it was written" in err


def test_a_long_evaluation_shows_a_bar_after_a_while(here, losscurve, monkeypatch):
    trained(config_for(here, max_steps=1, warmup_steps=0))
    drawn, seconds = [], itertools.count()
    monkeypatch.setattr(rich.progress.Progress, "start", lambda bar: drawn.append(bar.tasks[0]))
    monkeypatch.setattr(rich.progress.Progress, "update", lambda bar, task, **how: drawn.append(how))
    expected = losscurve("evaluate --text text.txt --stride 1")
    assert drawn == []  # no terminal
    monkeypatch.setattr(bars, "shows_bars", lambda: True)
    monkeypatch.setattr(bars, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    assert losscurve("evaluate --text text.txt --stride 1")[:2] == expected[:2]
    total = drawn[0]["total"]
    assert [how["completed"] for how in drawn if isinstance(how, dict)] == list(range(1, total + 1))
    assert isinstance(drawn[1], rich.progress.Task)  # at second 2: the bar waits that long
    assert drawn[1].description == "evaluating checkpoints"


REFUSED = {
    "checkpoints --text odd.txt": "odd.txt: character 'ß' (U+00DF) is not in the vocabulary of 12 characters; remove "
    "it, or evaluate weights with another tokenizer",
    "copy/bare.pt": "copy/bare.pt: is no run, so it has no validation split; give a text: --text FILE",
    "checkpoints --text empty.txt": "empty.txt: 0 tokens, and one is predicted from another; give more text",
    "checkpoints --text no.txt": "no.txt: there is no such file;",
    "checkpoints --window 17": "window = 17: checkpoints/best.pt has a context of 16 tokens; give that or less",
    "checkpoints --window 0": "window = 0: expected 1 or more",
    "checkpoints --stride 17": "stride = 17: windows of 16 tokens would leave some out; give 16 or less",
    "checkpoints --n_head 2": "n_head and gelu are for a bare state_dict; checkpoints has its own, so leave them out",
    "checkpoints --text odd.txt --data_dir data": "data_dir has the validation split of a run; with --text, leave it",
    "nothing": "nothing: no such file or folder; give a run folder, a state_dict",
    "odd.txt": "odd.txt: not a state_dict saved by torch.save;",
}


def test_what_cannot_be_evaluated_is_one_line(here, losscurve):
    trained(config_for(here, max_steps=4, eval_every=4))
    Path("copy").mkdir()
    shutil.copy("checkpoints/model.pt", "copy/bare.pt")
    shutil.copy("checkpoints/tokenizer.json", "copy")
    Path("odd.txt").write_text("aabbcß", encoding="utf-8")
    Path("empty.txt").write_text("")
    assert read_json(Path("checkpoints/tokenizer.json"))["vocab_size"] == 12
    for line, reason in REFUSED.items():
        code, out, err = losscurve(f"evaluate {line}")
        assert (code, out) == (2, ""), line
        assert err.startswith(f"error: {reason}"), err
        assert err.count("\n") == 1


def test_a_pipe_is_read_once_for_several_weights(here, scores, monkeypatch):
    trained(config_for(here, max_steps=4, eval_every=4))
    content = Path("text.txt").read_bytes()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    first, second = scores("checkpoints checkpoints/model.pt --text -")
    assert (first["text"], first["bytes"]) == ("-", len(content) - 1)
    assert second["tokens"] == first["tokens"]


def test_whole_numbers_are_no_weights(here, losscurve):
    trained(config_for(here, max_steps=1, warmup_steps=0, arch="llama", tokenizer="byte"))
    weights = dict(torch.load("checkpoints/model.pt"))
    write_hf(Run.open("checkpoints"), "hf")
    whole = {name: tensor.to(torch.int8) for name, tensor in load_file("hf/model.safetensors").items()}
    save_file(whole, "hf/model.safetensors")
    torch.save(weights | {"wte.weight": weights["wte.weight"].to(torch.int8)}, "checkpoints/model.pt")
    code, _, err = losscurve("evaluate hf --text text.txt")
    assert code == 2
    assert re.fullmatch(r"error: hf/model\.safetensors: \S+ holds int8 numbers, and weights here are .*\n", err)
    code, _, err = losscurve("evaluate checkpoints --weights last --text text.txt")
    assert (code, err.startswith("error: checkpoints/model.pt: ")) == (2, True)


def test_what_is_called_a_file_is_not_looked_for_on_the_hub(here, losscurve):
    for name in ("b/nope.gguf", "b/nope.pt"):
        code, _, err = losscurve(f"evaluate {name} --text text.txt")
        assert code == 2
        assert err.startswith(f"error: {name}: ")
        assert "huggingface" not in err


def test_sample_refuses_heads_for_weights_that_tell_their_own(here, losscurve):
    trained(config_for(here, max_steps=1, warmup_steps=0))
    code, _, err = losscurve("sample --checkpoint checkpoints/model.pt --n_head 4 --prompt a")
    assert code == 2
    assert "n_head and gelu are for a bare state_dict" in err
