"""The page of a model that is no run: the playground answers with that model, and nothing waits for a record."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_gguf import random_model
from test_page import client, events

from llm.commands.look import watch
from llm.errors import UserError
from llm.export.gguf_file import write_gguf
from llm.generate import continue_text
from llm.page.follow import Follower, is_model
from llm.page.messages import Viewer
from llm.tokens import huggingface
from llm.tokens.tokenizer import Bytes
from llm.weights.hf_config import settings_out
from llm.weights.hf_layout import weights_out


@pytest.fixture
def models(tmp_path, monkeypatch):
    """One model as a GGUF file and as a folder in Hugging Face's format."""
    monkeypatch.chdir(tmp_path)
    model = random_model(arch="llama")
    write_gguf(model, Bytes(), Path("m.gguf"), "float32", "m")
    Path("hf").mkdir()
    Path("hf/config.json").write_text(json.dumps(settings_out(model.config)))
    Path("hf/tokenizer.json").write_text(huggingface.write(Bytes()), encoding="utf-8")
    Path("hf/tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    save_file(weights_out(model.config, model.state_dict()), "hf/model.safetensors")
    return model


def test_the_playground_answers_with_the_model(models):
    page = client(Path("m.gguf"), Path("hf"))
    with torch.no_grad():
        logits = models(torch.tensor([list(b"aba")]))[0][0, -1, :257].double()
    expected = torch.softmax(logits, 0)
    ids = [token for (token,) in continue_text(models, Bytes(), "aba", 30, seed=7)]
    for number in (0, 1):
        likely = page.post(f"runs/{number}/next", json={"prompt": "aba", "weights": "model"}).json()["likely"]
        assert [token["id"] for token in likely] == expected.argsort(descending=True)[:20].tolist()
        assert [token["before"] for token in likely] == pytest.approx(expected[[t["id"] for t in likely]].tolist())
        asked = {"prompt": "aba", "weights": "model", "seed": 7, "count": 30}
        assert [t["id"] for t in events(page.post(f"runs/{number}/stream", json=asked))[:-1]] == ids


def test_what_the_page_is_told_of_a_model(models):
    for path in (Path("m.gguf"), Path("hf")):
        model, viewer = Follower(path, path.name), Viewer()
        model.update()
        facts = viewer.news(model)["facts"]
        assert (facts["is_model"], facts["weights"], facts["has_record"], facts["error"]) == (
            True,
            ["model"],
            False,
            "",
        )
        model.update()
        assert viewer.news(model) is None
    Path("run").mkdir()
    Path("run/config.toml").write_text("")
    Path("run/config.json").write_text("{}")
    assert not is_model(Path("run"))
    assert not is_model(Path("none"))


def test_a_damaged_model_is_refused_before_the_page_is_served(models, capsys):
    watch.check_sources([Path("m.gguf"), Path("hf"), Path("none")], wait_for_runs=True)
    assert capsys.readouterr().err == "warning: none: no run there yet; the page waits for one\n"
    for name in ("b c", "a"):
        (Path("runs") / name).mkdir(parents=True)
        (Path("runs") / name / "metrics.jsonl").touch()
    watch.check_sources([Path("runs")], wait_for_runs=True)
    assert capsys.readouterr().err.endswith("below it; to follow those: losscurve watch runs/a 'runs/b c'\n")
    Path("hf/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^hf: has a config\.json, but no model\.safetensors beside it"):
        watch.main(["hf"])
    Path("m.gguf").write_bytes(Path("m.gguf").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"^m\.gguf: cut off or damaged.*copy or download it again$"):
        watch.main(["m.gguf"])
