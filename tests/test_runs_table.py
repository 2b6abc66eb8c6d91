"""The table of runs: which folders are runs, the results of each, and that no name or damage breaks the list."""

import json
import os
import sys
from pathlib import Path

import pytest
from conftest import append, flags

from llm.commands.look import runs as command
from llm.config import from_settings, write_toml
from llm.errors import UserError
from llm.record import runs
from llm.record.runs import Summary, find, summary


def make(path: Path, losses: tuple[float | None, ...] = (5.0, 4.0, 4.5), every: int = 10, **settings) -> Path:
    """Make a run folder: an evaluation with each of the losses, and between them a training row of 1,000 tokens/s."""
    path.mkdir(parents=True)
    config = from_settings({"max_steps": 20, "warmup_steps": 0} | settings)
    (path / "config.toml").write_text(write_toml(config), encoding="utf-8")
    (path / "env.json").write_text("{}")
    for i, loss in enumerate(losses):
        seconds = 10.0 * i
        if i:
            append(path, step=i * every, split="train", loss=4.0, tokens_per_second=1000.0 + i, seconds=seconds)
        bits = None if loss is None else loss / 2
        append(path, step=i * every, split="val", loss=loss, bits_per_byte=bits, seconds=seconds)
    return path


def test_a_trained_run_is_listed_with_the_figures_that_it_printed(here, losscurve):
    code, out, err = losscurve(f"train --text text.txt --data_dir data --out_dir runs/one {flags()}")
    assert code == 0, err
    best = next(line for line in out.splitlines() if line.startswith("best val"))
    code, out, err = losscurve("runs")
    assert (code, err) == (0, "")
    head, row = out.splitlines()
    assert " ".join(head.split()) == "run steps best val bits/byte at step last val params tokens/s written state"
    words = row.split()
    assert words[:2] == ["runs/one", "12/12"]
    assert f"best val {words[2]} ({words[3]} bits per byte) at step {words[4]}, last val {words[5]} at" in best
    assert words[-1] == "done"
    (found,) = json.loads(losscurve("runs --json")[1])
    assert found["path"] == "runs/one"
    assert f"{found['best']:.4f}" == words[2]
    assert found["written"] == Path("runs/one/metrics.jsonl").stat().st_mtime


def test_which_folders_are_runs(tmp_path):
    for name in ("a", "deep/er/b", "a/inside", ".hidden/c", "a/step-000010/d", "a/damaged-step-000010-2/e"):
        make(tmp_path / name)
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "hugo").mkdir()
    (tmp_path / "hugo" / "config.toml").write_text("title = 'a site'\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "metrics.jsonl")  # reading it would wait for ever
    (tmp_path / "pipe" / "env.json").write_text("{}")
    found, whole = find(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a", "a/inside", "deep/er/b"]
    assert whole
    assert find(tmp_path / "loop" / "a")[0] == [tmp_path / "loop" / "a", tmp_path / "loop" / "a" / "inside"]
    with pytest.raises(UserError, match="no such folder"):
        find(tmp_path / "nowhere")


def test_a_search_is_bounded_and_warns(tmp_path, monkeypatch, losscurve):
    for number in range(10):
        make(tmp_path / str(number) / "run")
    monkeypatch.setattr(runs, "FOLDERS", 13)
    found, whole = find(tmp_path)
    assert (len(found), whole) == (2, False)
    _, _, err = losscurve(f"runs {tmp_path}")
    assert err == "warning: stopped after 13 folders; give a folder nearer to the runs\n"


def test_the_summary_of_a_run(tmp_path):
    found = summary(make(tmp_path / "run"))
    written = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime
    known = {"step": 20, "max_steps": 20, "best": 4.0, "bits_per_byte": 2.0, "best_step": 10, "last": 4.5}
    assert found == Summary(
        tmp_path / "run", "done", parameters=13_665_280, tokens_per_second=1001.5, written=written, **known
    )


@pytest.mark.parametrize(
    ("settings", "losses", "state", "reason"),
    [
        ({"max_steps": 30}, (5.0, 4.0, 4.5), "unfinished", ""),
        ({"max_steps": 30, "max_time": 20.0}, (5.0, 4.0, 4.5), "stopped", "max_time"),
        ({"max_steps": 30, "max_time": 21.0}, (5.0, 4.0, 4.5), "unfinished", ""),
        ({"max_steps": 99, "patience": 2}, (5.0, 4.0, 4.5, None), "stopped", "patience"),
        ({"max_steps": 99, "patience": 2}, (5.0, 4.0, 4.5, 3.0), "unfinished", ""),
        ({"max_steps": 99}, (), "unfinished", "no evaluation yet"),
        ({"max_steps": 20}, (None, None, None), "done", ""),
    ],
)
def test_why_a_run_is_not_done(settings, losses, state, reason, tmp_path):
    path = make(tmp_path / "run", losses, **settings)
    (path / "metrics.jsonl").touch()
    found = summary(path)
    assert (found.state, found.reason) == (state, reason)


def test_a_run_without_finite_losses_is_marked(tmp_path):
    path = make(tmp_path / "run", (5.0, 4.0), max_steps=99)
    assert summary(path).reason == ""
    append(path, step=30, split="train", loss=None, refused=[29, 30])
    assert (summary(path).state, summary(path).reason) == ("unfinished", "its last losses or gradients were not finite")
    append(path, step=40, split="train", loss=4.0, refused=[31])  # it recovered
    assert summary(path).reason == ""


def damage_the_record(path):
    lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (path / "metrics.jsonl").write_bytes(b"".join([lines[0], b"{torn\n", *lines[1:]]))
    return "metrics.jsonl: line 2 is damaged (not JSON); repair or remove that line"


def damage_the_settings(path):
    (path / "config.toml").write_text("n_layer = 0\n")
    return "n_layer = 0: expected a whole number at least 1 and at most 1000"


def settings_that_are_no_text(path):
    (path / "config.toml").write_bytes(b"\xff\xfe")
    return "config.toml: cannot be read ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)"


def no_settings(path):
    (path / "config.toml").unlink()
    return "no config.toml"


def a_folder_for_a_record(path):
    (path / "metrics.jsonl").unlink()
    (path / "metrics.jsonl").mkdir()
    return "no metrics.jsonl yet"


DAMAGES = (damage_the_record, damage_the_settings, settings_that_are_no_text, no_settings, a_folder_for_a_record)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_listed_with_the_reason_after_the_others(damage, tmp_path, losscurve):
    make(tmp_path / "whole", (9.0, 8.0))
    reason = damage(make(tmp_path / "broken"))
    code, out, err = losscurve(f"runs {tmp_path}")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["run", "whole", "broken"]
    state = "unfinished" if damage is a_folder_for_a_record else "damaged"
    assert out.splitlines()[2].endswith(f"{state}: {reason}")


@pytest.mark.parametrize(
    ("key", "order"),
    [
        ("bits", "cdba"),
        ("best", "dcba"),
        ("last", "dcba"),
        ("run", "abcd"),
        ("steps", "acdb"),
        ("params", "cadb"),
        ("speed", "dacb"),
        ("written", "adcb"),
    ],
)
def test_runs_are_sorted_by_the_key_with_unknown_values_last(key, order, losscurve, tmp_path, monkeypatch):
    rows = [
        Summary(Path("a"), "damaged", step=9, parameters=2, tokens_per_second=2.0, written=5.0),
        Summary(Path("b"), "done", best=4.0, last=4.0),
        Summary(Path("c"), "done", "", 8, 9, 3.0, 1.0, 5, 3.5, 7, 1.0, 1.0),
        Summary(Path("d"), "done", "", 7, 9, 2.0, 2.0, 5, 2.5, 1, 3.0, 2.0),
    ]
    monkeypatch.setattr(runs, "find", lambda folder: ([row.path for row in rows], True))
    monkeypatch.setattr(runs, "summary", lambda path: next(row for row in rows if row.path == path))
    listed = json.loads(losscurve(f"runs {tmp_path} --sort {key} --json")[1])
    assert [row["path"] for row in listed] == list(order)


def test_nothing_to_list(here, losscurve):
    assert losscurve("runs") == (0, "no run in or below .; losscurve train makes one\n", "")
    assert losscurve("runs --json") == (0, "[]\n", "")
    code, out, err = losscurve("runs nowhere")
    assert (code, out) == (2, "")
    assert err == "error: nowhere: no such folder; give one that has runs in or below it\n"
    assert losscurve("runs --sort loss")[0] == 2


def test_hostile_names_stay_harmless(tmp_path, losscurve):
    for name in ("\x1b[2J\x07red", "new\nline\r", "right\u202eleft", b"\xff\xfe".decode(errors="surrogateescape")):
        make(tmp_path / name)
    make(tmp_path / "[bold]日本[red]")
    code, out, _ = losscurve(f"runs {tmp_path}")
    assert code == 0
    assert len(out.splitlines()) == 6
    assert all(c.isprintable() or c == "\n" for c in out)
    assert "[bold]日本[red]" in out
    out.encode()  # no lone surrogate
    code, out, _ = losscurve(f"runs {tmp_path} --json")
    assert out.isascii()
    assert {row["path"] for row in json.loads(out)} == {str(path) for path in tmp_path.iterdir()}


def test_columns_are_aligned_under_wide_characters_too(tmp_path):
    from rich.cells import cell_len

    table = command.table([summary(make(tmp_path / name)) for name in ("日本語", "abc")], tmp_path)
    ends = {cell_len(line[: line.index(word)]) for line, word in zip(table, ("state", "done", "done"), strict=True)}
    assert len(ends) == 1


@pytest.mark.parametrize("room", [40, 60, 80, 100, 130])
def test_a_narrow_terminal_gets_what_fits_and_a_pipe_everything(room, tmp_path, losscurve, monkeypatch):
    from rich.cells import cell_len

    make(tmp_path / ("a" * 60))
    damage_the_record(make(tmp_path / "broken"))
    pipe = losscurve(f"runs {tmp_path}")[1]
    assert "a" * 60 in pipe
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(room))
    lines = losscurve(f"runs {tmp_path}")[1].splitlines()
    assert all(cell_len(line) <= room for line in lines[:3])
    assert lines[0].startswith("run ")
    assert "best val" in lines[0]
    assert lines[0].endswith("state")
    assert lines[3].startswith("broken: metrics.jsonl: line 2 is damaged")
    assert lines[4].startswith("(shortened")
    monkeypatch.setenv("COLUMNS", "400")
    assert losscurve(f"runs {tmp_path}")[1] == pipe


def test_a_listing_needs_no_torch(tmp_path):
    make(tmp_path / "run")
    import subprocess

    code = (
        "import sys; from llm.commands.main import main\n"
        f"code = main(['runs', {str(tmp_path)!r}])\n"
        "sys.exit(code or 'torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
