"""The live page's server: who may ask, and what it answers of the learning rate and in the playground."""

import json
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import flags, words

from llm.commands.main import main
from llm.config import from_settings
from llm.errors import UserError
from llm.page.playground import Playground, parse_question
from llm.run import Run
from llm.schedule import decay_start, lr_at, warmup_warning
from llm.tokens.tokenizer import Bytes

for package in ("starlette", "uvicorn", "plotly", "httpx"):
    pytest.importorskip(package)
testclient = pytest.importorskip("starlette.testclient", exc_type=ImportError)
server = pytest.importorskip("llm.page.server")

PORT, TOKEN, HOST = 8123, "secret-token", "127.0.0.1:8123"


def client(*paths, token=TOKEN, host=HOST):
    app = server.Server(paths, TOKEN, PORT).config.app
    return testclient.TestClient(app, base_url=f"http://{host}/{token}" if token else f"http://{host}")


# ---- who may ask


def test_the_page_and_its_parts_are_served_below_the_token(tmp_path):
    page = client(tmp_path).get("/")
    assert page.status_code == 200
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "set-cookie" not in page.headers
    parts = re.findall(r'(?:src|href)="([\w.]+)"', page.text)
    assert len(parts) == 3
    for name in (*parts, *server.SCRIPTS):
        assert client(tmp_path).get(name).status_code == 200, name
        assert client(tmp_path, token=None).get(name).status_code == 403, name
    for name in server.SCRIPTS:
        found = re.findall(r'from "./([\w.]+)"', client(tmp_path).get(name).text)
        assert set(found) <= set(server.SCRIPTS)


@pytest.mark.parametrize(
    "path", ["", "page.js", "plotly.js", "events", "schedule", "comparison", "tries", "runs/0/samples/1"]
)
@pytest.mark.parametrize("token", [None, "wrong", TOKEN[:-1], TOKEN + "x", f"x/{TOKEN}", f"?token={TOKEN}", "\u00e9"])
def test_without_the_token_everything_is_refused(tmp_path, path, token):
    answer = client(tmp_path, token=None).get(f"/{token}/{path}" if token else f"/{path}")
    assert (answer.status_code, answer.text[:7]) == (403, "refused")
    post = client(tmp_path, token=None).post(f"/{token}/runs/0/next", json={"prompt": "a"})
    assert post.status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": f"evil.example:{PORT}"},
        {"host": "127.0.0.1:9999"},
        {"host": f"{HOST}.evil.example"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": f"https://{HOST}"},
        {"origin": "http://127.0.0.1:9999"},
    ],
)
def test_another_host_or_origin_is_refused_even_with_the_token(tmp_path, headers):
    for path in ("", "schedule", "page.js"):
        assert client(tmp_path).get(path, headers=headers).status_code == 403
    assert client(tmp_path).post("runs/0/next", json={"prompt": "a"}, headers=headers).status_code == 403
    assert client(tmp_path).get("schedule", headers={"origin": f"http://{HOST}"}).status_code == 200
    assert client(tmp_path, host=f"localhost:{PORT}").get("schedule").status_code == 200


@pytest.mark.parametrize(
    "path", ["../config.toml", "%2e%2e/config.toml", "server.py", "page.js/../server.py", "/etc/passwd", "report.js/x"]
)
def test_no_path_leads_out(tmp_path, path):
    assert client(tmp_path).get(path).status_code in (403, 404)


def test_a_run_is_a_number_of_those_given(tmp_path):
    for run in ("1", "-1", "../x", "99999999999999999999"):
        assert client(tmp_path).post(f"runs/{run}/next", json={"prompt": "a"}).status_code in (404, 405), run
        assert client(tmp_path).get(f"runs/{run}/samples/0").status_code == 404, run


# ---- the slider


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("warmup", ["0", "20", "400"])
def test_the_schedule_is_that_of_the_training(tmp_path, schedule, warmup):
    given = {
        "max_steps": "1000",
        "warmup_steps": warmup,
        "max_lr": "0.00012345678",
        "min_lr": "1e-5",
        "schedule": schedule,
        **({"decay_fraction": "0.313"} if schedule == "wsd" else {}),
    }
    answer = client(tmp_path).get("schedule", params=given).json()
    config = from_settings(given)
    for step, lr in answer["curve"] + answer["table"]:
        assert lr == lr_at(step, config)
    steps = [step for step, _ in answer["curve"]]
    assert {0, config.warmup, decay_start(config), 1000} <= set(steps)
    assert answer["warning"] == warmup_warning(config)
    words = answer["flags"].split()
    typed = dict(zip([word.removeprefix("--") for word in words[::2]], words[1::2], strict=True))
    assert from_settings(typed) == config


@pytest.mark.parametrize(
    "given", [{"max_steps": "0"}, {"max_lr": "nan"}, {"schedule": "<b>"}, {"warmup_steps": "9e99"}]
)
def test_a_schedule_that_cannot_be_is_one_line(tmp_path, given):
    answer = client(tmp_path).get("schedule", params=given)
    assert answer.status_code == 400
    assert next(iter(given)) in answer.json()["error"]


# ---- the playground


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small run, and its folder."""
    folder = tmp_path_factory.mktemp("page")
    text = folder / "text.txt"
    text.write_text(words(400), encoding="utf-8")
    assert main(f"train --text {text} --data_dir {folder}/data --out_dir {folder}/run {flags()}".split()) == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, None, 1.0), (0.7, 5, 1.0), (1.5, 7, 0.8), (0.3, None, 0.5)]
)
def test_probabilities_are_those_of_softmax_top_k_and_top_p(trained, temperature, top_k, top_p):
    body = {"prompt": "aba c", "temperature": temperature, "top_k": top_k, "top_p": top_p}
    answer = client(trained).post("runs/0/next", json=body).json()
    run = Run.open(trained)
    ids = torch.tensor([run.tokenizer.encode("aba c").tolist()])
    with torch.no_grad():
        logits = run.model("last", "cpu")(ids)[0][0, -1, : run.tokenizer.vocab_size].double()
    before = torch.softmax(logits, 0)
    heated = torch.softmax(logits / temperature, 0)
    order = heated.argsort(descending=True).tolist()
    kept = order[:top_k]
    total, so_far, nucleus = sum(heated[i] for i in kept), 0.0, []
    for i in kept:
        if so_far < top_p:
            nucleus.append(i)
        so_far += float(heated[i] / total)
    share = sum(heated[i] for i in nucleus)
    assert [t["id"] for t in answer["likely"]] == before.argsort(descending=True).tolist()[:20]
    for token in answer["likely"]:
        i = token["id"]
        assert token["text"] == run.tokenizer.decode([i])
        assert token["before"] == pytest.approx(float(before[i]), abs=1e-6)
        assert token["temperature"] == pytest.approx(float(heated[i]), abs=1e-6)
        assert token["top_k"] == pytest.approx(float(heated[i] / total) if i in kept else 0, abs=1e-6)
        assert token["after"] == pytest.approx(float(heated[i] / share) if i in nucleus else 0, abs=1e-6)
    assert answer["possible"] == len(nucleus)
    assert answer["entropy"][0] == pytest.approx(-float((before * before.log()).sum()), abs=1e-5)


def events(answer):
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]


def test_a_stream_is_what_sample_draws_with_that_seed_beyond_the_context_too(trained):
    body = {"prompt": "ab", "seed": 7, "count": 30, "temperature": 0.9, "top_k": 8, "top_p": 0.95}
    *tokens, last = events(client(trained).post("runs/0/stream", json=body))
    assert last == {}
    expected = Run.open(trained).sample("ab", 30, 7, temperature=0.9, top_k=8, top_p=0.95)
    assert "ab" + "".join(token["text"] for token in tokens) == expected
    for token in tokens:
        assert next(t for t in token["likely"] if t["id"] == token["id"])["after"] > 0


def test_stepping_goes_on_from_the_tokens_so_far(trained):
    page, ids = client(trained), []
    for _ in range(4):
        asked = {"prompt": "ab", "ids": ids, "count": 1, "temperature": 0}
        seen = page.post("runs/0/next", json=asked).json()["likely"][0]["id"]
        token = events(page.post("runs/0/stream", json=asked))[0]["id"]
        assert token == seen  # temperature 0 takes the likeliest
        ids.append(token)
    whole = [
        t["id"] for t in events(page.post("runs/0/stream", json={"prompt": "ab", "count": 4, "temperature": 0}))[:-1]
    ]
    assert ids == whole


def test_a_continuation_ends_before_a_stop_text_also_one_that_began_before(trained):
    page, run = client(trained), Run.open(trained)
    asked = {"prompt": "ab", "seed": 7, "count": 40}
    plain = events(page.post("runs/0/stream", json=asked))[:-1]
    assert {token["cut"] for token in plain} == {""}
    text = "".join(token["text"] for token in plain)
    stop = text[9:12]
    assert text.index(stop) == 9
    ended = events(page.post("runs/0/stream", json=asked | {"stop": ["never", stop]}))[:-1]
    assert ended[:-1] == plain[: len(ended) - 1]
    shown = "".join(token["text"] for token in ended).removesuffix(ended[-1]["cut"])
    assert "ab" + shown == run.sample("ab", 40, 7, stop=stop) == "ab" + text[:9]

    def single(ids, **more):  # the next token after some
        return events(page.post("runs/0/stream", json=asked | {"ids": ids, "count": 1} | more))[0]

    ids = [token["id"] for token in plain]
    for place in range(9, 12):
        token = single(ids[:place])
        across = plain[place - 1]["text"] + token["text"]  # begins before this request
        assert single(ids[:place], stop=[across])["cut"] == across
        assert single(ids[:place], stop=[plain[place - 1]["text"] + "never"])["cut"] == ""
    token = single(ids[:12])
    spelled = plain[11]["text"]
    assert single(ids[:12], stop=[spelled, spelled + token["text"]])["cut"] == (
        token["text"] if token["text"] == spelled else ""
    )  # the end before has been passed
    for wrong in ("x", [1], ["x"] * 21, ["x" * 20_001], [""]):
        assert page.post("runs/0/stream", json=asked | {"stop": wrong}).json()["error"].startswith("stop")


def test_a_character_of_several_tokens_is_shown_where_it_ends():
    def logits(ids):  # what follows C3 is A9, and anything else is followed by C3
        found = torch.full((1, Bytes().vocab_size), -1e9)
        found[0, 0xA9 if ids == 0xC3 else 0xC3] = 0.0
        return found

    def rows(model, ids, vocab_size):
        token = ids[0, -1].item()
        while True:
            token = (yield logits(token)).item()

    playground = Playground()
    playground.load = lambda *_: (None, Bytes())
    with mock.patch("llm.page.playground.logits_after", rows):
        told = [
            next(
                playground.stream(Path(), parse_question(json.dumps({"prompt": "a", "ids": ids, "count": 1}).encode()))
            )
            for ids in ([], [0xC3], [0xC3, 0xA9])
        ]
    assert [token["text"] for token in told] == ["", "\u00e9", ""]


def test_the_model_is_loaded_once_and_anew_when_its_file_changes(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    ground = Playground()
    first, _ = ground.load(tmp_path / "run", "last")
    assert ground.load(tmp_path / "run", "last")[0] is first
    best, _ = ground.load(tmp_path / "run", "best")
    assert best is not first
    shutil.copy(trained / "best.pt", tmp_path / "new")
    (tmp_path / "new").replace(tmp_path / "run" / "best.pt")
    assert ground.load(tmp_path / "run", "best")[0] is not best


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a" * 20_001}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "é"}, ""),
        ({"prompt": "\ud800"}, ""),
        ({"prompt": "a", "ids": [10**9]}, "ids"),
        ({"prompt": "a", "ids": [-1]}, "ids"),
        ({"prompt": "a", "ids": [1] * 2001}, "ids"),
        ({"prompt": "a", "weights": "../best"}, "weights"),
        ({"prompt": "a", "weights": []}, "weights"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "temperature": 10**400}, "temperature"),
        ({"prompt": "a", "top_k": 0}, "top_k"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "top_p": True}, "top_p"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "count": 10**6}, "count"),
    ],
)
def test_what_cannot_be_asked_is_one_line(trained, body, words):
    answer = client(trained).post("runs/0/next", content=json.dumps(body))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert words in error
    assert "\n" not in error


def test_a_body_without_end_or_sense_is_refused(trained):
    for content in (b"x" * 2**19, b"[" * 100_000, b"\xff", b"[]"):
        assert client(trained).post("runs/0/next", content=content).status_code == 400
    with pytest.raises(UserError):
        parse_question(b"1")


def test_weights_that_are_not_there_are_one_line(tmp_path):
    asked = {"prompt": "a", "weights": "best"}
    assert "not saved yet" in client(tmp_path).post("runs/0/next", json=asked).json()["error"]
    (failed,) = events(client(tmp_path).post("runs/0/stream", json=asked))
    assert "not saved yet" in failed["error"]
