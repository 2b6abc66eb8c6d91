"""The live page's server: who may ask, how a run is followed, and what is shown of it."""

import json
import math
import shutil
import sys

import pytest
import torch
from conftest import append, flags

from llm.config import from_settings
from llm.errors import UserError
from llm.metrics import cut
from llm.page import follow
from llm.page.follow import COLUMNS, POINTS, Follower, Thinned, names_of, samples_in
from llm.page.playground import Playground, question
from llm.run import Run
from llm.schedule import lr_at, warmup_warning

pytest.importorskip("starlette")
pytest.importorskip("httpx")
testclient = pytest.importorskip("starlette.testclient", exc_type=ImportError)

PORT, TOKEN, HOST = 8123, "secret-token", "127.0.0.1:8123"
HOSTILE = "<img src=x onerror=alert(1)>"


def client(*paths, token=TOKEN):
    from llm.page.server import app

    made = testclient.TestClient(app(paths, TOKEN, PORT), base_url=f"http://{HOST}")
    if token:
        made.cookies.set(f"losscurve-{PORT}", token)
    return made


def row(step, split="train", loss=3.0, **more):
    return {"step": step, "split": split, "loss": loss, "lr": 1e-3, "tokens": step * 64, "seconds": step * 0.5} | more


def fill(folder, steps):
    folder.mkdir(exist_ok=True)
    for step in steps:
        append(folder, **row(step, loss=5 - step / 100, grad_norm=1.0, tokens_per_second=100.0))


def shown_steps(follower):
    return follower.fast()["loss"][0]


# ---- who may ask


def test_the_token_in_the_address_becomes_a_strict_cookie_and_opens_the_page(tmp_path):
    browser = client(tmp_path, token=None)
    answer = browser.get(f"/?token={TOKEN}", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    page = browser.get("/")
    assert page.status_code == 200
    assert "script-src 'self'" in page.headers["content-security-policy"]
    for name in ("/page.js", "/page.css"):
        assert browser.get(name).status_code == 200


@pytest.mark.parametrize("path", ["/", "/page.js", "/plotly.js", "/events", "/schedule", "/nothing"])
@pytest.mark.parametrize("token", [None, "wrong", "", TOKEN[:-1], TOKEN + "x"])
def test_without_the_token_everything_is_refused(tmp_path, path, token):
    assert client(tmp_path, token=token).get(path, params={"token": token} if token else {}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1:9999"},
        {"host": f"{HOST}.evil.example"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": f"https://{HOST}"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_another_host_or_origin_is_refused_even_with_the_token(tmp_path, headers):
    assert client(tmp_path).get("/schedule", headers=headers).status_code == 403
    assert client(tmp_path).get("/", params={"token": TOKEN}, headers=headers).status_code == 403
    own = {"origin": f"http://{HOST}", "sec-fetch-site": "same-origin"}
    assert client(tmp_path).get("/schedule", headers=own).status_code == 200


@pytest.mark.parametrize(
    "path", ["/../config.toml", "/%2e%2e/config.toml", "/server.py", "/page.js/../server.py", "//etc/passwd"]
)
def test_no_path_leads_out(tmp_path, path):
    assert client(tmp_path).get(path).status_code == 404


def test_a_run_is_a_number_of_those_given(tmp_path):
    for run in ("1", "-1", "../x", "99999999999999999999"):
        assert client(tmp_path).post(f"/runs/{run}/next", json={"prompt": "a"}).status_code in (404, 405), run


# ---- following


def test_rows_are_followed_as_they_come_and_a_torn_line_waits(tmp_path):
    fill(tmp_path, range(5))
    follower = Follower(tmp_path, "a")
    follower.look()
    assert shown_steps(follower) == [0, 1, 2, 3, 4]
    line = json.dumps(row(5)).encode()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line[:20])
    follower.look()
    assert follower.count == 5
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line[20:] + b"\n")
    follower.look()
    assert shown_steps(follower) == [0, 1, 2, 3, 4, 5]
    assert follower.generation == 1  # never read anew


def test_only_new_bytes_are_read(tmp_path, monkeypatch):
    fill(tmp_path, range(50))
    follower = Follower(tmp_path, "a")
    follower.look()
    parsed = []
    real = follow.rows_in
    monkeypatch.setattr(follow, "rows_in", lambda block: parsed.append(block) or real(block))
    follower.look()
    assert parsed == []
    append(tmp_path, **row(50))
    follower.look()
    assert len(parsed) == 1
    assert parsed[0].count(b"step") == 1


def test_a_record_cut_back_for_a_resume_is_read_anew(tmp_path):
    fill(tmp_path, range(10))
    follower = Follower(tmp_path, "a")
    follower.look()
    cut(tmp_path, 4)
    fill(tmp_path, [5, 6])
    follower.look()
    assert shown_steps(follower) == [0, 1, 2, 3, 4, 5, 6]


def test_a_record_written_over_in_place_is_read_anew(tmp_path):
    fill(tmp_path, range(10))
    follower = Follower(tmp_path, "a")
    follower.look()
    longer = "".join(json.dumps(row(step, loss=7.0)) + "\n" for step in range(20))
    (tmp_path / "metrics.jsonl").write_text(longer)  # the same file, and longer than before
    follower.look()
    assert shown_steps(follower) == list(range(20))
    assert set(follower.fast()["loss"][COLUMNS.index("loss")]) == {7.0}


def test_a_folder_deleted_under_it_is_waited_for(tmp_path):
    run = tmp_path / "run"
    follower = Follower(run, "a")
    follower.look()  # not there yet
    assert follower.slow()["there"] is False
    fill(run, range(5))
    follower.look()
    assert follower.slow()["there"] is True
    shutil.rmtree(run)
    follower.look()
    assert (follower.slow()["there"], shown_steps(follower)) == (False, [])
    fill(run, [0, 1])
    follower.look()
    assert shown_steps(follower) == [0, 1]


@pytest.mark.parametrize(
    "line",
    [b"\xff\xfe", b"[" * 100_000, b"{}", b"1,2", b'{"step": -1, "split": "train"}', b'{"step": "x", "split": "train"}',
     b'{"step": 1e999, "split": "train"}', b'{"step": 3, "split": []}', b'{"step": 3, "split": {"a": 1}}', b"null"],
)  # fmt: skip
def test_damaged_lines_are_left_out(tmp_path, line):
    fill(tmp_path, [0])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    fill(tmp_path, [9])
    follower = Follower(tmp_path, "a")
    follower.look()
    assert shown_steps(follower) == [0, 9]


def test_numbers_that_javascript_cannot_hold_become_null(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "split": "train", "loss": NaN}\n{"step": 2, "split": "train", "loss": 1e400, "lr": "<b>"}\n'
        '{"step": 3, "split": "val", "loss": true, "spikes": "x"}\n{"step": 4, "split": "train", "loss": 2}\n'
    )
    follower = Follower(tmp_path, "a")
    follower.look()
    assert shown_steps(follower) == [4]
    json.dumps([follower.fast(), follower.slow(), follower.pace()], allow_nan=False)


def test_broken_settings_are_an_error_to_show(tmp_path):
    fill(tmp_path, range(3))
    (tmp_path / "config.toml").write_text("max_steps = 'many'\n")
    follower = Follower(tmp_path, "a")
    follower.look()
    assert "max_steps" in follower.slow()["error"]
    (tmp_path / "config.toml").write_text("max_steps = 100\n")
    follower.look()
    assert (follower.slow()["error"], follower.slow()["max_steps"]) == (None, 100)


def test_a_viewer_who_appends_what_is_new_has_what_a_new_viewer_gets(tmp_path):
    from llm.page.server import Seen, news

    follower, seen = Follower(tmp_path, "a"), Seen()
    held = []
    for upto in range(0, 60, 7):
        fill(tmp_path, range(upto, upto + 7))
        follower.look()
        message = news(0, follower, seen)
        if "all" in message:
            held = message["all"]["loss"]
        else:
            held = [a + b for a, b in zip(held, message["more"], strict=True)]
        assert held == follower.fast()["loss"]
        assert news(0, follower, seen) is None


def test_a_page_left_open_is_given_the_curves_anew_before_it_grows(tmp_path, monkeypatch):
    from llm.page import server

    monkeypatch.setattr(server, "RECENT", 10)
    follower, seen, kinds = Follower(tmp_path, "a"), server.Seen(), []
    for upto in range(0, 30, 3):
        fill(tmp_path, range(upto, upto + 3))
        follower.look()
        kinds.append("all" in server.news(0, follower, seen))
    assert kinds == [True, False, False, False, True, False, False, False, True, False]


# ---- thinning


@pytest.mark.parametrize("count", [0, 1, 2, 999, 1996, 1997, 2000, 5003, 40_001])
def test_a_thinned_curve_keeps_its_ends_and_extremes(count):
    values = torch.rand(count, generator=torch.Generator().manual_seed(count)).tolist()
    if count > 10:
        values[count // 3], values[count // 2] = 9.0, -9.0
    curve = Thinned("loss")
    for step, value in enumerate(values):
        curve.add([step, 0, 0, value, None, None, None])
        curve.add([step, 0, 0, None, 1.0, None, None])  # no point of this curve
    kept = curve.rows()
    assert len(kept) <= POINTS
    assert [r[3] for r in kept] == [values[r[0]] for r in kept]
    steps = [r[0] for r in kept]
    assert steps == sorted(set(steps))
    if count:
        assert (steps[0], steps[-1]) == (0, count - 1)
        assert (max(r[3] for r in kept), min(r[3] for r in kept)) == (max(values), min(values))
    if count <= 900:
        assert len(kept) == count
    if count > POINTS:  # the same detail everywhere
        halves = [sum(s < count / 2 for s in steps), sum(s >= count / 2 for s in steps)]
        assert max(halves) < 1.5 * min(halves)


def test_many_evaluations_keep_the_best():
    val = [row(i, "val", loss=5.0) for i in range(3 * POINTS)]
    val[4321]["loss"] = 1.0
    kept = follow.thinned_evaluations(val)
    assert len(kept) <= POINTS + 1
    assert val[4321] in kept


# ---- facts


def test_a_sample_may_hold_a_line_that_looks_like_a_header():
    val = [row(step, "val", loss=4.0 - step / 100) for step in (0, 10, 20)]
    fake = "text\n\n--- step 15 | val 1.0000 ---\nmore\n--- step 20 | val 3.8000 ---\nend"
    blocks = (("0", "4.0000", "first"), ("10", "3.9000", fake), ("20", "3.8000", "last"))
    text = "".join(f"--- step {step} | val {loss} ---\n{words}\n\n" for step, loss, words in blocks)
    assert samples_in(text, val) == [
        {"step": 0, "text": "first"},
        {"step": 10, "text": fake},
        {"step": 20, "text": "last"},
    ]


def test_two_folders_of_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert names_of(paths) == [str(path) for path in paths]
    assert names_of([paths[0], tmp_path / "other"]) == ["run", "other"]


def test_hostile_names_and_samples_come_out_only_as_json(tmp_path):
    from llm.page.server import Seen, news

    folder = tmp_path / "<script>alert(1)<"
    fill(folder, range(3))
    append(folder, **row(3, "val", loss=4.0))
    (folder / "samples.txt").write_text(f"--- step 3 | val 4.0000 ---\n{HOSTILE}\x1b[2J\x00\n\n")
    follower = Follower(folder, names_of([folder])[0])
    follower.look()
    message = json.dumps(news(0, follower, Seen()))
    assert json.loads(message)["slow"]["samples"] == [{"step": 3, "text": HOSTILE + "\x1b[2J\x00"}]
    assert "\n" not in message  # which would end a server-sent event
    for path in ("/", "/page.js"):
        assert "alert(1)" not in client(folder).get(path).text


def test_time_left_is_that_of_the_pace_so_far(tmp_path):
    fill(tmp_path, range(0, 101, 10))
    (tmp_path / "config.toml").write_text("max_steps = 300\nmax_time = 120.0\n")
    follower = Follower(tmp_path, "a")
    follower.look()
    assert follower.pace()["seconds_left"] == pytest.approx(70)  # max_time; the steps would take 100 s
    assert follower.pace()["tokens_per_second"] == 100


# ---- the slider


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", ["0", "20", "400"])
def test_the_schedule_is_that_of_the_training(tmp_path, schedule, warmup):
    given = {
        "max_steps": "1000",
        "warmup_steps": warmup,
        "max_lr": "0.00012345678",
        "min_lr": "1e-5",
        "schedule": schedule,
    }
    answer = client(tmp_path).get("/schedule", params=given).json()
    config = from_settings(given)
    for step, lr in answer["curve"] + answer["table"]:
        assert lr == lr_at(step, config)
    steps = [step for step, _ in answer["curve"]]
    assert {0, config.warmup, 1000} <= set(steps)
    assert answer["warning"] == warmup_warning(config)
    words = answer["flags"].split()
    typed = dict(zip([word.removeprefix("--") for word in words[::2]], words[1::2], strict=True))
    assert from_settings(typed) == config


@pytest.mark.parametrize(
    "given", [{"max_steps": "0"}, {"max_lr": "nan"}, {"schedule": "<b>"}, {"warmup_steps": "9e99"}]
)
def test_a_schedule_that_cannot_be_is_one_line(tmp_path, given):
    answer = client(tmp_path).get("/schedule", params=given)
    assert answer.status_code == 400
    assert next(iter(given)) in answer.json()["error"]


# ---- the playground


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small run, and its folder."""
    from conftest import words

    from llm.commands.main import main

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
    answer = client(trained).post("/runs/0/next", json=body).json()
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
    *tokens, last = events(client(trained).post("/runs/0/stream", json=body))
    assert last == {}
    expected = Run.open(trained).sample("ab", 30, 7, "last", 0.9, 8, 0.95)
    assert "ab" + "".join(token["text"] for token in tokens) == expected
    for token in tokens:
        assert next(t for t in token["likely"] if t["id"] == token["id"])["after"] > 0


def test_stepping_goes_on_from_the_tokens_so_far(trained):
    page, ids = client(trained), []
    for _ in range(4):
        asked = {"prompt": "ab", "ids": ids, "count": 1, "temperature": 0}
        seen = page.post("/runs/0/next", json=asked).json()["likely"][0]["id"]
        token = events(page.post("/runs/0/stream", json=asked))[0]["id"]
        assert token == seen  # temperature 0 takes the likeliest
        ids.append(token)
    whole = [
        t["id"] for t in events(page.post("/runs/0/stream", json={"prompt": "ab", "count": 4, "temperature": 0}))[:-1]
    ]
    assert ids == whole


def test_the_model_is_loaded_once_and_anew_when_its_file_changes(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    ground = Playground()
    first, _ = ground.opened(tmp_path / "run", "last")
    assert ground.opened(tmp_path / "run", "last")[0] is first
    best, _ = ground.opened(tmp_path / "run", "best")
    assert best is not first
    shutil.copy(trained / "best.pt", tmp_path / "new")
    (tmp_path / "new").replace(tmp_path / "run" / "best.pt")
    assert ground.opened(tmp_path / "run", "best")[0] is not best


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
    answer = client(trained).post("/runs/0/next", content=json.dumps(body))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert words in error
    assert "\n" not in error


def test_a_body_without_end_or_sense_is_refused(trained):
    for content in (b"x" * 2**19, b"[" * 100_000, b"\xff", b"[]"):
        assert client(trained).post("/runs/0/next", content=content).status_code == 400
    with pytest.raises(UserError):
        question(b"1")


def test_weights_that_are_not_there_are_one_line(tmp_path):
    fill(tmp_path, [0])
    asked = {"prompt": "a", "weights": "best"}
    assert "not saved yet" in client(tmp_path).post("/runs/0/next", json=asked).json()["error"]
    (failed,) = events(client(tmp_path).post("/runs/0/stream", json=asked))
    assert "not saved yet" in failed["error"]


# ---- the command


def test_what_is_missing_is_named_with_its_extra(monkeypatch, tmp_path):
    from llm.commands.watch import main

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"losscurve\[dashboard\]"):
        main([str(tmp_path)])


def test_watch_refuses_what_is_no_folder_or_port(tmp_path):
    from llm.commands.watch import main

    pytest.importorskip("uvicorn")
    pytest.importorskip("plotly")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a folder"):
        main([str(tmp_path / "file")])
    with pytest.raises(UserError, match="port"):
        main(["--port", "70000"])


def test_landmarks_are_the_chapters():
    assert [round(mark["loss"], 2) for mark in follow.landmarks(50257)] == [
        round(math.log(50257) / share, 2) for share in (1, 2, 4)
    ]
