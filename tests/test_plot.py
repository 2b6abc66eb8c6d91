"""Pictures: written whole in any format, labelled in words, at ease with hostile names and odd records."""

import math
import re
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from conftest import append, environment

from llm.commands.main import main
from llm.config import TrainConfig
from llm.errors import UserError
from llm.record.chart_style import plain, save_figure
from llm.record.metrics import read_record
from llm.record.plot import _summary, draw, draw_comparison, draw_run, plot_runs, plot_schedule
from llm.record.points import MAX_POINTS, thin_by_mean
from llm.schedule import lr_at

pytestmark = pytest.mark.pictures


def make_run(folder, steps=2000, vocab_size=50257, higher=0.0):
    """A run that overfits: 10.8 at first, lowest at 1000, then rising; training falls all the way."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f"vocab_size = {vocab_size}\n")
    for step in range(0, steps + 1, 25):
        train = 4.4 + 6.4 * math.exp(-step / 150) - step / 1500 + higher
        append(folder, step=step, split="train", loss=train, lr=lr_at(step, TrainConfig(max_steps=2000)))
        if step % 250 == 0:
            val = 4.78 + 6.05 * math.exp(-step / 150) + max(0, step - 1000) / 4000 + higher
            append(folder, step=step, split="val", loss=val, bits_per_byte=val * 0.4665)
    return folder


def words(svg):
    """All text of an SVG file, unescaped."""
    import html

    return html.unescape(" | ".join(re.findall(r"<text[^>]*>(.*?)</text>", svg.read_text(encoding="utf-8"), re.S)))


@pytest.mark.parametrize("kind", ["png", "svg", "pdf", "JPG", "webp", "eps"])
def test_formats(tmp_path, kind):
    out = tmp_path / "new folder" / f"curve.{kind}"
    plot_runs([make_run(tmp_path / "run")], out)
    magic = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "JPG": b"\xff\xd8", "webp": b"RIFF", "eps": b"%!PS"}
    assert out.read_bytes().startswith(magic[kind])
    assert out.stat().st_size > 10_000
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_one_run_says_what_it_shows(tmp_path):
    plot_runs([make_run(tmp_path / "my run")], tmp_path / "a.svg")
    text = words(tmp_path / "a.svg")
    for expected in (
        "my run", "best validation loss 4.79 at step 1,000 (2.23 bits per byte); overfits since step 1,000",
        "best 4.79 at step 1,000", "ln V = 10.82", "ln V / 2 = 5.41", "ln V / 4 = 2.71", "validation 5.03",
        "training 3.07", "learning rate", "0.0003", "overfitting", "step", "loss (nats per token)",
    ):  # fmt: skip
        assert expected in text, expected


def test_a_best_loss_of_the_average_says_so(tmp_path):
    run = make_run(tmp_path / "a")
    append(run, step=2000, split="val", loss=4.8, bits_per_byte=2.0, val_loss_ema=1.2)
    plot_runs([run], tmp_path / "a.svg")
    assert "best validation loss 1.20 at step 2,000 (0.50 bits per byte) by the average" in words(tmp_path / "a.svg")


def test_losses_that_are_not_finite_are_counted_and_rows_about_the_steps_are_none(tmp_path):
    run = make_run(tmp_path / "a")
    append(run, step=1990, split="train", loss=None, max_steps=3000)
    assert "not finite" not in _summary(read_record(run), None)
    append(run, step=1991, split="train", loss=None)
    assert _summary(read_record(run), None).endswith("; 1 loss not finite")
    append(run, step=1992, split="train", loss=None)
    assert _summary(read_record(run), None).endswith("; 2 losses not finite")


def test_several_runs_differ_without_colour(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", higher=0.2), make_run(tmp_path / "c", steps=500)]
    figure = draw(runs)
    (axes,) = figure.axes  # no second axis: the learning rates would not be told apart
    validation = [line for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 1]
    assert len({line.get_marker() for line in validation}) == 3
    assert sum(line.get_linestyle() == "--" for line in axes.lines) == 3
    plot_runs(runs, tmp_path / "a.svg")
    text = words(tmp_path / "a.svg")
    assert all(label in text for label in ("3 runs", "a 4.79", "b 4.99", "c 5.00"))
    assert "higher losses cut off, up to 11.03" in text
    cut_off = [line for line in axes.lines if max(line.get_ydata()) > axes.get_ylim()[1]]
    assert cut_off
    assert all(line.get_clip_on() for line in cut_off)  # they do not go on over the title
    plot_runs([runs[0], make_run(tmp_path / "d", vocab_size=65)], tmp_path / "b.svg")
    assert "vocabularies differ" in words(tmp_path / "b.svg")


def test_labels_of_curves_that_end_together_do_not_touch(tmp_path):
    runs = [make_run(tmp_path / f"run{i}", higher=i / 1000) for i in range(8)]
    labels = [text for text in draw(runs).axes[0].texts if text.get_text().startswith("run")]
    heights = sorted(text.xy[1] for text in labels)
    assert len(heights) == 8
    assert all(b - a > 0.05 for a, b in pairwise(heights))


@pytest.mark.parametrize("name", ["$\\frac{", "$x^2$", "<script>x</script>", "a&b;\"'", "中文", "%s{}\\n"])
def test_hostile_names_stay_text(tmp_path, name):
    rows = [{"step": 0, "split": "val", "loss": 1.0, "bits_per_byte": None, "lr": None}]
    for drawing in (lambda: draw_run(rows, name), lambda: draw_comparison([rows, rows], [name, name])):
        save_figure(drawing, tmp_path / "a.svg")
        assert plain(name) in words(tmp_path / "a.svg")
        assert "<script" not in (tmp_path / "a.svg").read_text(encoding="utf-8")
    save_figure(drawing, tmp_path / "a.png")


def test_names_become_one_short_line():
    assert plain("a\nb\x1b[31m\u202e\udcff") == "a�b�[31m��"
    assert len(plain("x" * 300)) == 22
    assert plain("0" * 20 + "1" * 20) == "0" * 11 + "…" + "1" * 10


def row(step, split, loss, **more):
    return {"step": step, "split": split, "loss": loss, "bits_per_byte": None, "lr": None} | more


@pytest.mark.parametrize("vocab_size", [None, 50257])
@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row(0, "train", 10.8, lr=0.0), row(0, "val", 10.8)],
        [row(0, "val", None), row(10, "train", None, lr=1e-3)],
        [row(step, "val", 5.0) for step in range(0, 100, 10)],
        [row(step, "train", 5.0 - step / 50, lr=1e-3) for step in range(0, 100, 10)],
        [row(0, "val", 10.8), row(10, "val", 1e29), row(20, "val", None)],
        [row(0, "val", 0.0), row(1, "val", 0.0)],
        [row(2**62, "val", 1.0)],
    ],
    ids=["empty", "step 0", "nulls", "no train", "no val", "diverged", "zero", "huge step"],
)
def test_odd_records_are_drawn(tmp_path, rows, vocab_size):
    save_figure(lambda: draw_run(rows, "odd", vocab_size), tmp_path / "a.png")
    save_figure(lambda: draw_comparison([rows, []], ["odd", "empty"]), tmp_path / "b.svg")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_thinning_keeps_the_mean():
    points = [(step, math.sin(step)) for step in range(0, 12_000)]
    thin = thin_by_mean(points)
    assert len(thin) == MAX_POINTS
    assert math.fsum(y for _, y in thin) / len(thin) == pytest.approx(math.fsum(y for _, y in points) / len(points))
    assert thin_by_mean(points[:MAX_POINTS]) == points[:MAX_POINTS]
    assert len(thin_by_mean(points[: MAX_POINTS + 1])) <= MAX_POINTS


def test_a_long_record_is_drawn_quickly(tmp_path):
    rows = [row(step, "train", 3 + math.exp(-step / 999), lr=1e-3) for step in range(20_000)]
    rows += [row(step, "val", 3.1, lr=1e-3) for step in range(0, 20_000, 20)]
    save_figure(lambda: draw_run(rows[:10], "first"), tmp_path / "a.png")  # loads matplotlib
    start = time.process_time()
    save_figure(lambda: draw_run(rows, "long", 50257), tmp_path / "a.png")
    assert time.process_time() - start < 3  # 0.3 s on a quiet machine


def test_refusals(tmp_path):
    run = make_run(tmp_path / "run", steps=50)
    for out, said in (
        (tmp_path / "x.gif2", r"\.png"),
        (tmp_path / "x", r"\.svg"),
        (run / "metrics.jsonl" / "x.png", "cannot be written"),
    ):
        with pytest.raises(UserError, match=said):
            plot_runs([run], out)
    (tmp_path / "dir.png").mkdir()
    with pytest.raises(UserError, match=r"dir\.png: cannot be written"):
        plot_runs([run], tmp_path / "dir.png")
    with pytest.raises(UserError, match="no run here"):
        plot_runs([run, tmp_path / "nowhere"], tmp_path / "x.png")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "dir.png"}


def test_a_failed_drawing_leaves_the_old_picture(tmp_path):
    out = tmp_path / "a.png"
    plot_schedule(TrainConfig(), out)
    before = out.read_bytes()
    with pytest.raises(UserError):
        plot_runs([tmp_path / "nowhere"], out)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_runs_of_the_same_name_are_labelled_with_their_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a/run", steps=50)
    make_run(tmp_path / "b/run", steps=50)
    assert main(["plot", "a/run", "b/run", "--out", "x.svg"]) == 0
    text = words(tmp_path / "x.svg")
    assert "a/run" in text
    assert "b/run" in text


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_schedule_picture(tmp_path, schedule):
    config = TrainConfig(schedule=schedule)
    plot_schedule(config, tmp_path / "s.svg")
    text = words(tmp_path / "s.svg")
    assert "warm-up" in text
    assert "peak 0.0003 at step 100" in text
    assert ("end 0.0003" if schedule == "constant" else "end 3e-05") in text


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run")
    assert main(["plot", "run"]) == 0
    assert (run / "loss_curve.png").stat().st_size > 10_000
    assert main(["plot", "run", str(make_run(tmp_path / "other"))]) == 0
    assert (tmp_path / "loss_curves.png").stat().st_size > 10_000
    assert "wrote loss_curves.png" in capsys.readouterr().out
    assert main(["plot"]) == 2
    assert main(["plot", "nowhere"]) == 2
    assert "no run here" in capsys.readouterr().err


def test_help_loads_nothing_heavy_and_no_window_is_opened(tmp_path):
    run = make_run(tmp_path / "run", steps=50)
    code = f"""
import sys
from llm.commands.main import run_command
for name in ("plot", "schedule"):
    try: run_command(name, ["--help"])
    except SystemExit: pass
assert not {{"matplotlib", "torch", "numpy"}} & set(sys.modules)
run_command("plot", [{str(run)!r}])
assert "matplotlib.pyplot" not in sys.modules
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_shading_of_overfitting_lies_behind_the_learning_rate():
    """The axes of the losses are drawn over those of the learning rate: a shading in them would hide it."""
    rows = [row(step, "val", loss, lr=0.1) for step, loss in [(0, 4.0), (10, 3.0), (20, 2.0), (30, 2.5), (40, 3.0)]]
    rows += [row(step, "train", 4.0 - step / 20, lr=0.1) for step in range(0, 41, 10)]
    losses, rate = draw_run(rows, "run", 65).axes
    assert losses.get_zorder() > rate.get_zorder()
    assert not losses.patches
    assert len(rate.patches) == 1


def test_matplotlibs_words_about_its_caches_do_not_reach_a_person(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=50)
    (tmp_path / "no folder").touch()
    command = [sys.executable, "-m", "llm", "plot", str(run_dir), "--out", str(tmp_path / "curve.png")]
    env = environment() | {"MPLCONFIGDIR": str(tmp_path / "no folder")}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert ended.stderr == ""
