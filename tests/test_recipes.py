"""The recipes of docs/elsewhere.md run as they stand there, and compute what the run computes."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL, environment, trained, words

from llm.config import GPTConfig, from_settings
from llm.evaluate import evaluate
from llm.export import huggingface
from llm.export.source import open_source
from llm.weights import open_weights

pytest.importorskip("transformers")
PAGE = (ROOT / "docs" / "elsewhere.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^#### (.+?)\n(.*?)(?=^#{2,4} |\Z)", PAGE, re.M | re.S))
heavy = pytest.mark.skipif(not os.environ.get("LOSSCURVE_TORTURE"), reason="part of make torture")


def block(section, language):
    """The one code block of a section in that language."""
    [found] = re.findall(rf"^```{language}\n(.*?)^```$", section, re.M | re.S)
    return found


def title_of(program):
    [title] = [title for title in RECIPES if title.endswith(f"with {program}")]
    return title


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def exported(request, tmp_path_factory):
    """(folder, source): a folder with my.txt, a short run in runs/mine and its export in runs/mine-hf."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "my.txt").write_text(words(900), encoding="utf-8")
    settings = SMALL | {"text": str(folder / "my.txt"), "out_dir": str(folder / "runs" / "mine"), "block_size": 64}
    settings |= {"data_dir": str(folder / "data"), "tokenizer": "byte", "arch": request.param}
    trained(from_settings(settings))
    source = open_source(folder / "runs" / "mine", "hf")
    huggingface.export(source, folder / "runs" / "mine-hf")
    return folder, source


def run(command, folder):
    """Run a program as the page has it, without a network; return its stdout."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(
        command, cwd=folder, env=environment() | offline, capture_output=True, text=True, check=False, timeout=300
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def run_recipe(title, folder):
    (folder / "recipe.py").write_text(block(RECIPES[title], "python"), encoding="utf-8")
    return run([sys.executable, "recipe.py"], folder)


def log_probabilities(source, context, continuation):
    """The log-probability of each token of a continuation, by the run's own model."""
    ids = torch.tensor([*map(int, context), *map(int, continuation)])[None]
    with torch.no_grad():
        logits = source.model(ids[:, :-1])[0][0]
    found = -F.cross_entropy(logits, ids[0, 1:], reduction="none")
    return found[len(context) - 1 :]


def test_generate(exported, monkeypatch, capsys):
    folder, source = exported
    monkeypatch.chdir(folder)
    exec(block(RECIPES["Generate"], "python"), {})
    text = capsys.readouterr().out.rstrip("\n")
    assert text.startswith("ROMEO:")
    assert len(source.tokenizer.encode(text)) > len("ROMEO:")


@heavy
def test_lora(exported):
    pytest.importorskip("peft")
    folder, source = exported
    shutil.rmtree(folder / "runs" / "mine-lora", ignore_errors=True)
    printed = run_recipe(title_of("peft"), folder)
    assert "trainable params" in printed
    opened = open_weights(str(folder / "runs" / "mine-lora"), GPTConfig())
    tuned = opened.model(torch.device("cpu"))
    assert opened.tokenizer.to_json() == source.tokenizer.to_json()
    before = source.model.state_dict()
    changed = {name for name, weight in tuned.state_dict().items() if name in before and not weight.equal(before[name])}
    linear = {name for name, weight in before.items() if name.startswith("h.") and weight.dim() == 2}
    assert changed == linear
    ids = source.tokenizer.encode((folder / "my.txt").read_text(encoding="utf-8"))
    losses = [evaluate(model, ids, 64, len(ids)).loss for model in (source.model, tuned)]
    assert losses[1] < losses[0]
    program, *line = shlex.split(block(RECIPES[title_of("peft")], "sh"))
    assert program == "losscurve"
    assert run([sys.executable, "-m", "llm", *line], folder).startswith("ROMEO:")


@heavy
def test_one_supervised_step(exported):
    pytest.importorskip("trl")
    folder, source = exported
    run_recipe(title_of("trl"), folder)
    state = json.loads((folder / "runs/mine-sft/checkpoint-1/trainer_state.json").read_text(encoding="utf-8"))
    found = []
    encode = source.tokenizer.encode
    for prompt, completion in re.findall(r'"prompt": (".*?"), "completion": (".*?")', RECIPES[title_of("trl")]):
        tokens = [*encode(json.loads(completion)), source.tokenizer.end_of_text]
        found.append(log_probabilities(source, encode(json.loads(prompt)), tokens))
    assert len(found) == 2
    assert state["log_history"][0]["loss"] == pytest.approx(-torch.cat(found).mean().item(), abs=1e-3)
    tuned = open_weights(str(folder / "runs" / "mine-sft"), GPTConfig())
    assert tuned.config.n_embd == source.model.config.n_embd
    assert not torch.equal(tuned.weights["h.0.mlp.c_proj.weight"], source.model.h[0].mlp.c_proj.weight)


@heavy
def test_a_task_of_ones_own(exported):
    pytest.importorskip("lm_eval")
    folder, source = exported
    section = RECIPES[title_of("lm-eval")]
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "toy.jsonl").write_text(block(section, "json"), encoding="utf-8")
    (folder / "tasks" / "toy.yaml").write_text(block(section, "yaml"), encoding="utf-8")
    program, *line = shlex.split(block(section, "sh"))
    assert program == "lm_eval"
    shutil.rmtree(folder / "lm", ignore_errors=True)
    printed = run([sys.executable, "-m", "lm_eval", *line, "--log_samples", "--output_path", "lm"], folder)
    [samples] = (folder / "lm").rglob("samples_toy_*.jsonl")
    right = []
    for sample in map(json.loads, samples.read_text(encoding="utf-8").splitlines()):
        encode, question = source.tokenizer.encode, sample["doc"]
        ours = [
            log_probabilities(source, encode(question["prompt"]), encode(choice)).sum().item()
            for choice in question["choices"]
        ]
        assert [float(found) for found, _ in sample["filtered_resps"]] == pytest.approx(ours, abs=1e-3)
        right.append(ours.index(max(ours)) == question["answer"])
    assert len(right) == 2
    accuracy = float(re.search(r"\|acc\s*\|↑\s*\|\s*([\d.]+)\|", printed)[1])
    assert accuracy == sum(right) / 2


@heavy
def test_where_a_head_looks(exported):
    pytest.importorskip("transformer_lens")
    folder, source = exported
    recipe = block(RECIPES[title_of("TransformerLens")], "python")
    saving = recipe + '\nimport torch\ntorch.save(cache["pattern", layer][0, head], "pattern.pt")\n'
    (folder / "recipe.py").write_text(saving, encoding="utf-8")
    run([sys.executable, "recipe.py"], folder)
    found = torch.load(folder / "pattern.pt", weights_only=True)
    ids = source.tokenizer.encode("ROMEO: who is it?")
    assert found.shape == (len(ids), len(ids))
    assert torch.allclose(found, pattern_of(source.model, torch.from_numpy(ids).long()[None], head=1), atol=1e-5)


def pattern_of(model, ids, head):
    """The attention of a head in the first layer, from the queries and keys that our model attends with: (T, T)."""
    seen = []
    attend = F.scaled_dot_product_attention

    def spy(q, k, *others, **options):
        seen.append((q, k))
        return attend(q, k, *others, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", spy)
        model(ids)
    q, k = (part[0, head] for part in seen[0])
    T, D = q.shape
    scores = (q @ k.T / D**0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    return scores.softmax(-1)


def test_the_modelfile_fits_the_export():
    """Ollama itself is never run: the instructions, and the values that depend on the run."""
    [modelfile] = re.findall(r"^```\n(FROM .*?)^```$", PAGE, re.M | re.S)
    lines = dict(line.split(" ", 1) for line in modelfile.splitlines())
    assert list(lines) == ["FROM", "TEMPLATE", "PARAMETER"]
    [exported] = re.findall(r"^losscurve export runs/(\w+) --to gguf ", PAGE, re.M)
    assert lines["FROM"] == f"./{exported}.gguf"
    assert lines["TEMPLATE"] == "{{ .Prompt }}"
    name, value = lines["PARAMETER"].split()
    assert (name, int(value)) == ("num_ctx", GPTConfig().block_size)
