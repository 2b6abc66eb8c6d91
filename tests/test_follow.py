"""Following a run from another process: what is read, what is kept of it, and what the page is told."""

import json
import math
import os
import shutil

import pytest
import torch
from conftest import append, write_samples

from llm.page import follow, messages
from llm.page.follow import Follower
from llm.page.messages import Viewer, curves, facts, landmarks, names_of, pace, thin_evaluations
from llm.page.thin import COLUMNS, ExtremesCurve
from llm.record.metrics import Record
from llm.record.points import MAX_POINTS

HOSTILE = "<img src=x onerror=alert(1)>"


def row(step, split="train", loss=3.0, **more):
    return {"step": step, "split": split, "loss": loss, "lr": 1e-3, "tokens": step * 64, "seconds": step * 0.5} | more


def fill(folder, steps):
    folder.mkdir(exist_ok=True)
    for step in steps:
        append(folder, **row(step, loss=5 - step / 100, grad_norm=1.0, tokens_per_second=100.0))


def shown_steps(follower):
    return curves(follower)["loss"][0]


# ---- following


def test_rows_are_followed_as_they_come_and_a_torn_line_waits(tmp_path):
    fill(tmp_path, range(5))
    follower = Follower(tmp_path, "a")
    follower.update()
    assert shown_steps(follower) == [0, 1, 2, 3, 4]
    line = json.dumps(row(5)).encode()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line[:20])
    follower.update()
    assert follower.count == 5
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line[20:] + b"\n")
    follower.update()
    assert shown_steps(follower) == [0, 1, 2, 3, 4, 5]
    assert follower.generation == 1  # never read anew


def test_only_new_bytes_are_read(tmp_path, monkeypatch):
    fill(tmp_path, range(50))
    follower = Follower(tmp_path, "a")
    follower.update()
    parsed = []
    real = follow.rows_in
    monkeypatch.setattr(follow, "rows_in", lambda block: parsed.append(block) or real(block))
    follower.update()
    assert parsed == []
    append(tmp_path, **row(50))
    follower.update()
    assert len(parsed) == 1
    assert parsed[0].count(b"step") == 1


def test_a_record_cut_back_for_a_resume_is_read_anew(tmp_path):
    fill(tmp_path, range(10))
    follower = Follower(tmp_path, "a")
    follower.update()
    Record(tmp_path).cut(4)
    fill(tmp_path, [5, 6])
    follower.update()
    assert shown_steps(follower) == [0, 1, 2, 3, 4, 5, 6]


def test_a_record_written_over_in_place_is_read_anew(tmp_path):
    fill(tmp_path, range(10))
    follower = Follower(tmp_path, "a")
    follower.update()
    longer = "".join(json.dumps(row(step, loss=7.0)) + "\n" for step in range(20))
    (tmp_path / "metrics.jsonl").write_text(longer)  # the same file, and longer than before
    follower.update()
    assert shown_steps(follower) == list(range(20))
    assert set(curves(follower)["loss"][COLUMNS.index("loss")]) == {7.0}


def test_a_folder_deleted_under_it_is_waited_for(tmp_path):
    run = tmp_path / "run"
    follower = Follower(run, "a")
    follower.update()  # not there yet
    assert facts(follower)["has_record"] is False
    fill(run, range(5))
    append(run, **row(4, "val"))
    write_samples(run, (4, 3.0, "words"))
    follower.update()
    assert (facts(follower)["has_record"], facts(follower)["samples"]) == (True, [4])
    shutil.rmtree(run)
    follower.update()
    assert (facts(follower)["has_record"], shown_steps(follower), facts(follower)["samples"]) == (False, [], [])
    fill(run, [0, 1])
    follower.update()
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
    follower.update()
    assert shown_steps(follower) == [0, 9]


def test_numbers_that_javascript_cannot_hold_become_null(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "split": "train", "loss": NaN}\n{"step": 2, "split": "train", "loss": 1e400, "lr": "<b>"}\n'
        '{"step": 3, "split": "val", "loss": true, "spikes": "x"}\n{"step": 4, "split": "train", "loss": 2}\n'
    )
    follower = Follower(tmp_path, "a")
    follower.update()
    assert shown_steps(follower) == [4]
    json.dumps([curves(follower), facts(follower), pace(follower)], allow_nan=False)


def test_broken_settings_are_an_error_that_stays_until_they_are_fixed(tmp_path):
    fill(tmp_path, range(3))
    (tmp_path / "config.toml").write_text("max_steps = 'many'\n")
    follower = Follower(tmp_path, "a")
    follower.update()
    version = follower.version
    for _ in range(3):
        follower.update()
        assert "max_steps" in facts(follower)["error"]
    assert follower.version == version  # said once
    (tmp_path / "config.toml").write_text("max_steps = 100\n")
    follower.update()
    assert (facts(follower)["error"], facts(follower)["max_steps"]) == ("", 100)


def test_settings_are_shown_as_they_are_typed(tmp_path):
    fill(tmp_path, range(3))
    (tmp_path / "config.toml").write_text('save_every = "10m"\ncompile = true\ntext = ["a", "b"]\n')
    follower = Follower(tmp_path, "a")
    follower.update()
    shown = facts(follower)["settings"]
    assert [shown[name] for name in ("save_every", "compile", "text")] == ["600s", "true", "a b"]


def test_a_line_without_end_is_an_error_that_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "BLOCK", 1000)
    fill(tmp_path, range(3))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"x" * 5000)
    follower = Follower(tmp_path, "a")
    for _ in range(3):
        follower.update()
        assert "4 MiB" in facts(follower)["error"]
        assert not follower.is_behind
    assert shown_steps(follower) == [0, 1, 2]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_plain_file_is_not_opened(tmp_path):
    for name in ("metrics.jsonl", "samples.jsonl", "config.toml", "best.pt"):
        os.mkfifo(tmp_path / name)  # to open one would wait for ever
    follower = Follower(tmp_path, "a")
    follower.update()
    assert (follower.has_record, facts(follower)["weights"]) == (False, [])


@pytest.mark.parametrize("look", [1000, 3000, 7000, 11_000])
@pytest.mark.parametrize("torn", ["", '{"step": 300, '])
def test_a_long_record_is_read_in_several_looks(tmp_path, monkeypatch, look, torn):
    monkeypatch.setattr(follow, "BLOCK", 1000)
    monkeypatch.setattr(follow, "LOOK", look)
    fill(tmp_path, range(300))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    follower, viewer, counts = Follower(tmp_path, "a"), Viewer(), []
    while not counts or follower.is_behind:
        follower.update()
        counts.append(follower.count)
        assert viewer.news(follower)["pace"]["read"] == (follower.offset / follower.size if follower.is_behind else 1)
    follower.update()
    assert counts == sorted(set(counts))
    assert len(counts) > 3
    assert shown_steps(follower) == list(range(300))
    assert follower.generation == 1


def test_verdicts_are_those_of_explain_where_no_row_was_left_out(tmp_path):
    from llm.config import from_settings, read_toml
    from llm.record.explain import explain
    from llm.record.metrics import read_record

    (tmp_path / "config.toml").write_text("vocab_size = 100\nmax_steps = 400\n")
    for step in range(0, 400, 5):
        append(tmp_path, **row(step, loss=4 - step / 200, grad_norm=1.0))
        if step % 50 == 0:
            append(tmp_path, **row(step, "val", loss=4 + abs(step - 100) / 100))
    append(tmp_path, **row(400, "val", loss=7.0))
    follower = Follower(tmp_path, "a")
    follower.update()
    config = from_settings(read_toml(str(tmp_path / "config.toml")))
    assert follower.verdicts == explain(read_record(tmp_path), config)
    assert any(line.startswith("overfits since step 100") for line in follower.verdicts)
    assert facts(follower)["overfits_since"] == 100


def test_the_band_is_shown_only_where_settings_and_data_are_those_of_the_band(tmp_path, monkeypatch):
    from llm.record import bands
    from llm.record.bands import Band

    band = Band("chapter", 5, (0, 10), (4.0, 3.0), (0.1, 0.1))
    monkeypatch.setattr(bands, "band_of", lambda given, data: band if data == {"train.bin": "a"} else None)
    fill(tmp_path, [0])
    (tmp_path / "config.toml").write_text("max_steps = 100\n")
    follower = Follower(tmp_path, "a")
    follower.update()
    assert facts(follower)["band"] is None  # no env.json yet
    (tmp_path / "env.json").write_text(json.dumps({"data": {"train.bin": "a"}}))
    follower.update()
    assert facts(follower)["band"] == [[0, 10], [4.0, 3.0], [0.1, 0.1]]
    (tmp_path / "env.json").write_text(json.dumps({"data": {"train.bin": "another"}}))
    follower.update()
    assert facts(follower)["band"] is None


def test_a_viewer_who_appends_what_is_new_has_what_a_new_viewer_gets(tmp_path):
    follower, viewer = Follower(tmp_path, "a"), Viewer()
    held = []
    for upto in range(0, 60, 7):
        fill(tmp_path, range(upto, upto + 7))
        follower.update()
        message = viewer.news(follower)
        if "all" in message:
            held = message["all"]["loss"]
        else:
            held = [a + b for a, b in zip(held, message["more"], strict=True)]
        assert held == curves(follower)["loss"]
        assert viewer.news(follower) is None


def test_a_page_left_open_is_given_the_curves_anew_before_it_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(messages, "RECENT", 10)
    follower, viewer, kinds = Follower(tmp_path, "a"), Viewer(), []
    for upto in range(0, 30, 3):
        fill(tmp_path, range(upto, upto + 3))
        follower.update()
        kinds.append("all" in viewer.news(follower))
    assert kinds == [True, False, False, False, True, False, False, False, True, False]


# ---- thinning


@pytest.mark.parametrize("count", [0, 1, 2, 999, 1996, 1997, 2000, 5003, 40_001])
def test_a_thinned_curve_keeps_its_ends_and_extremes(count):
    values = torch.rand(count, generator=torch.Generator().manual_seed(count)).tolist()
    if count > 10:
        values[count // 3], values[count // 2] = 9.0, -9.0
    curve = ExtremesCurve("loss")
    for step, value in enumerate(values):
        curve.add([step, 0, 0, value, None, None, None])
        curve.add([step, 0, 0, None, 1.0, None, None])  # no point of this curve
    kept = curve.rows()
    assert len(kept) <= MAX_POINTS
    assert [r[3] for r in kept] == [values[r[0]] for r in kept]
    steps = [r[0] for r in kept]
    assert steps == sorted(set(steps))
    if count:
        assert (steps[0], steps[-1]) == (0, count - 1)
        assert (max(r[3] for r in kept), min(r[3] for r in kept)) == (max(values), min(values))
    if count <= 900:
        assert len(kept) == count
    if count > MAX_POINTS:  # the same detail everywhere
        halves = [sum(s < count / 2 for s in steps), sum(s >= count / 2 for s in steps)]
        assert max(halves) < 1.5 * min(halves)


def test_many_evaluations_keep_the_best():
    val = [row(i, "val", loss=5.0) for i in range(3 * MAX_POINTS)]
    val[4321]["loss"] = 1.0
    kept = thin_evaluations(val)
    assert len(kept) <= MAX_POINTS + 1
    assert val[4321] in kept


# ---- facts


def test_a_sample_may_hold_a_line_that_looks_like_a_header(tmp_path):
    for step in (0, 10, 20):
        append(tmp_path, **row(step, "val", loss=4.0 - step / 100))
    fake = "téxt\n\n--- step 15 | val 1.0000 ---\nmore\n--- step 20 | val 3.8000 ---\nend"
    write_samples(tmp_path, (0, 4.0, "first\n"), (10, 3.9, fake), (20, 3.8, ""))
    follower = Follower(tmp_path, "a")
    follower.update()
    assert facts(follower)["samples"] == [0, 10, 20]
    assert [follower.sample(step) for step in (0, 10, 20)] == ["first\n", fake, ""]
    assert follower.sample(15) is None


def test_samples_are_followed_and_none_is_shown_of_another_step(tmp_path):
    follower, blocks = Follower(tmp_path, "a"), []
    for step in range(0, 50, 10):
        blocks.append((step, 4.0, f"sample {step}"))
        write_samples(tmp_path, *blocks)
        follower.update()  # the record is written before it
        append(tmp_path, **row(step, "val", loss=4.0))
        follower.update()
        assert facts(follower)["samples"] == [s for s, _, _ in blocks]
    write_samples(tmp_path, (0, 4.0, "a run begun anew"), (7, 4.0, "x" * 1000))
    assert follower.sample(20) is None  # before the next look
    (tmp_path / "samples.jsonl").unlink()
    assert follower.sample(0) is None
    follower.update()
    assert facts(follower)["samples"] == []


def test_weights_that_come_after_the_evaluation_are_seen(tmp_path):
    fill(tmp_path, [0])
    follower, viewer = Follower(tmp_path, "a"), Viewer()
    follower.update()
    assert viewer.news(follower)["facts"]["weights"] == []
    (tmp_path / "best.pt").write_bytes(b"x")
    follower.update()
    assert viewer.news(follower)["facts"]["weights"] == ["best"]


def test_two_folders_of_one_name_get_their_paths(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert names_of(paths) == [str(path) for path in paths]
    assert names_of([paths[0], tmp_path / "other"]) == ["run", "other"]


def test_hostile_names_and_samples_come_out_only_as_text_in_json(tmp_path):
    folder = tmp_path / "<script>alert(1)<"
    fill(folder, range(3))
    append(folder, **row(3, "val", loss=4.0))
    write_samples(folder, (3, 4.0, f"{HOSTILE}\x1b[2J\x00"))
    follower = Follower(folder, names_of([folder])[0])
    follower.update()
    message = json.dumps(Viewer().news(follower))
    assert "\n" not in message  # which would end a server-sent event
    assert json.loads(message)["facts"]["name"] == "<script>alert(1)<"
    assert follower.sample(3) == HOSTILE + "\x1b[2J\x00"


def test_time_left_is_that_of_the_pace_so_far(tmp_path):
    fill(tmp_path, range(0, 101, 10))
    (tmp_path / "config.toml").write_text("max_steps = 300\nmax_time = 120.0\n")
    follower = Follower(tmp_path, "a")
    follower.update()
    assert pace(follower)["seconds_left"] == pytest.approx(70)  # max_time; the steps would take 100 s
    assert pace(follower)["tokens_per_second"] == 100


@pytest.mark.parametrize(
    ("settings", "ended"),
    [("max_steps = 9", ""), ("max_steps = 3", "finished"), ("max_steps = 9\npatience = 2", "stopped by patience")],
)
def test_a_run_that_has_ended_says_how(tmp_path, settings, ended):
    follower = Follower(tmp_path, "a")
    assert facts(follower)["ended"] == ""
    (tmp_path / "config.toml").write_text(f"vocab_size = 100\n{settings}\n")
    for step in range(4):
        append(tmp_path, **row(step, "val", 3.0 + step))
    follower.update()
    assert facts(follower)["ended"] == ended


def test_landmarks_are_the_chapters():
    assert [round(mark["loss"], 2) for mark in landmarks(50257)] == [
        round(math.log(50257) / share, 2) for share in (1, 2, 4)
    ]
