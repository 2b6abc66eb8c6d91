"""The schedule against the chapter's own formula and its closed forms, and what `schedule` prints."""

import math
import re
from itertools import pairwise

import pytest
from conftest import ROOT, flags
from hypothesis import given
from hypothesis import strategies as st

from llm.commands import schedule as command
from llm.commands.main import main
from llm.config import TrainConfig, over_preset, read_toml
from llm.errors import UserError
from llm.evaluate import Evaluation
from llm.page.messages import schedule_points
from llm.page.server import schedule_answer
from llm.schedule import decay_start, lr_at, warmup_warning
from llm.training.events import Line
from llm.weights import run_config


def chapter_lr(step, warmup_steps=100, max_steps=5000, max_lr=3e-4, min_lr=3e-5):
    """As `scripts/train.py` of the chapter has it."""
    if step < warmup_steps:
        return max_lr * (step / warmup_steps)
    t = (step - warmup_steps) / (max_steps - warmup_steps)
    return min_lr + 0.5 * (max_lr - min_lr) * (1 + math.cos(math.pi * t))


@pytest.mark.parametrize("config", [TrainConfig(), TrainConfig(min_lr=3e-5)], ids=["defaults", "floor as written"])
def test_equals_the_chapter_bit_for_bit(config):
    assert [lr_at(step, config) for step in range(5001)] == [chapter_lr(step) for step in range(5001)]


def test_known_values():
    linear = TrainConfig(max_steps=110, warmup_steps=10, max_lr=1.0, min_lr=0.2, schedule="linear")
    assert [lr_at(step, linear) for step in (0, 5, 10, 60, 110)] == pytest.approx([0, 0.5, 1.0, 0.6, 0.2])
    constant = TrainConfig(max_steps=110, warmup_steps=10, max_lr=1.0, schedule="constant")
    assert [lr_at(step, constant) for step in (0, 5, 10, 60, 110, 999)] == [0, 0.5, 1.0, 1.0, 1.0, 1.0]
    cosine = TrainConfig(max_steps=110, warmup_steps=10, max_lr=1.0, min_lr=0.2)
    assert [lr_at(step, cosine) for step in (10, 60, 110)] == pytest.approx([1.0, 0.6, 0.2])
    assert lr_at(0, TrainConfig(warmup_steps=0)) == pytest.approx(3e-4)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_wsd_is_its_closed_form(share, floor):
    """The least of three lines: the warm-up, the peak, and the straight line that ends at the floor."""
    config = TrainConfig(max_steps=200, warmup_steps=20, max_lr=2.0, min_lr=floor, schedule="wsd", decay_fraction=share)
    length = min(200 * share, 180)  # the cool-down never cuts off the warm-up
    for step in range(201):
        expected = min(2.0 * step / 20, 2.0, floor + (2.0 - floor) * (200 - step) / length)
        assert lr_at(step, config) == pytest.approx(expected, abs=1e-12), step
    assert lr_at(200, config) == lr_at(999, config) == floor


def test_the_cool_down_is_two_fifths_unless_given_and_never_nothing():
    assert decay_start(TrainConfig(schedule="wsd")) == 3000
    assert decay_start(TrainConfig(schedule="wsd", decay_fraction=0.1)) == 4500
    short = TrainConfig(max_steps=3, warmup_steps=0, schedule="wsd", decay_fraction=0.01)
    assert [lr_at(step, short) for step in range(4)] == pytest.approx([3e-4, 3e-4, 3e-4, 3e-5])


def test_a_cool_down_belongs_to_wsd():
    with pytest.raises(UserError, match=r"decay_fraction = 0\.2: works with schedule = 'wsd' only, and it is 'cosine'"):
        TrainConfig(decay_fraction=0.2)
    said = []
    preset = {"schedule": "wsd", "decay_fraction": 0.2}
    assert over_preset(preset, {"schedule": "linear"}, said.append).decay_fraction is None
    assert said == [
        "decay_fraction = 0.2 of the preset is ignored: it works with schedule = 'wsd' only, and schedule is 'linear'"
    ]
    assert over_preset(preset, {"max_steps": 90}, said.append).decay_fraction == 0.2


@pytest.mark.parametrize(
    ("lr", "shown"), [(0.0, "0.00000"), (3e-4, "0.00030"), (1e-5, "0.00001"), (9.9e-6, "9.9e-06"), (2e-9, "2.0e-09")]
)
def test_a_line_shows_a_small_learning_rate(lr, shown):
    line = str(Line(5, lr, 2.0, Evaluation(2.0, None, 10), 1.0, ""))
    assert line == f"step     5 | lr {shown} | train 2.0000 | val 2.0000 | t 1.0s"


@pytest.mark.pictures
def test_down_to_zero(here, losscurve):
    """The schedule, a run and its pictures, its resume, the page's answer, with a last learning rate of 0."""
    code, out, err = losscurve("schedule --schedule wsd --min_lr 0 --max_steps 100 --out s.svg")
    assert code == 0, err
    assert "60      3.000e-04       100.0%  start of cool-down" in out
    assert "100      0.000e+00         0.0%  end" in out
    assert "end 0<" in (here / "s.svg").read_text()
    code, out, err = losscurve(f"train text.txt {flags(schedule='wsd', min_lr=0)}")
    assert code == 0, err
    assert "step    12 | lr 0.00000 |" in out
    assert read_toml("checkpoints/config.toml")["decay_fraction"] == 0.4
    assert losscurve("train --resume --max_steps 16")[0] == 0
    config = run_config(here / "checkpoints")
    answer = schedule_answer({"schedule": "wsd", "min_lr": "0", "max_steps": "16", "warmup_steps": "2"})
    same = TrainConfig(max_steps=16, warmup_steps=2, min_lr=0.0, schedule="wsd")
    assert answer["curve"] == [[step, lr_at(step, same)] for step in range(17)]
    assert answer["flags"].endswith("--min_lr 0.0 --max_steps 16 --schedule wsd --decay_fraction 0.4")
    assert [lr for _, lr in schedule_points(config)][-1] == 0
    for name in ("plot", "report", "explain"):
        code, _, err = losscurve(f"{name} checkpoints")
        assert code == 0, err


@st.composite
def configs(draw):
    steps = draw(st.integers(1, 300))
    peak = draw(st.floats(1e-8, 10.0))
    return TrainConfig(
        max_steps=steps,
        warmup_steps=draw(st.none() | st.integers(0, max(steps - 1, 0))),
        max_lr=peak,
        min_lr=draw(st.none() | st.floats(0.0, 1.0).map(lambda share: share * peak if share > 1e-6 else 0.0)),
        **draw(
            st.sampled_from([{"schedule": name} for name in ("cosine", "linear", "constant", "wsd")])
            | st.floats(1e-3, 1.0).map(lambda share: {"schedule": "wsd", "decay_fraction": share})
        ),
    )


@given(configs())
def test_bounded_monotone_continuous(config):
    rates = [lr_at(step, config) for step in range(config.max_steps + 2)]
    peak, warmup, slack = config.max_lr, config.warmup, 1e-12 * config.max_lr
    assert rates[warmup] == pytest.approx(peak, rel=1e-12)
    assert all(0 <= rate <= peak + slack for rate in rates)
    assert all(a <= b + slack for a, b in pairwise(rates[: warmup + 1]))
    assert all(a >= b - slack for a, b in pairwise(rates[warmup:]))
    floor = peak if config.schedule == "constant" else config.final_lr
    assert rates[-1] == rates[-2] == pytest.approx(floor, abs=slack)
    down = peak * math.pi / 2 / max(config.max_steps - decay_start(config), 1)  # the steepest of a cosine
    assert all(abs(b - a) <= max(down, peak / max(warmup, 1)) + slack for a, b in pairwise(rates))


@pytest.mark.parametrize("steps", [1, 10, 49, 50, 5000, 10_000, 600_000])
def test_default_warmup_is_never_warned_about(steps):
    assert warmup_warning(TrainConfig(max_steps=steps)) is None


@pytest.mark.parametrize(("warmup", "warned"), [(0, True), (49, True), (50, False), (250, False), (251, True)])
def test_warns_outside_one_to_five_percent(warmup, warned):
    line = warmup_warning(TrainConfig(warmup_steps=warmup))
    assert (line is not None) == warned
    if line:
        assert "--warmup_steps 50 to 250" in line
        assert "\n" not in line


def test_one_step_run():
    assert [lr_at(step, TrainConfig(max_steps=1)) for step in (0, 1)] == [3e-4, 3e-5]


@pytest.mark.pictures
def test_command_prints_the_schedule_and_draws_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        main(["schedule", "--max_steps=1000", "--warmup-steps", "200", "--learning_rate", "1e-3", "--n_layer=2"]) == 0
    )
    out, err = capsys.readouterr()
    rows = {int(m[1].replace(",", "")): float(m[2]) for m in re.finditer(r"^ *([\d,]+)  +(\S+)  +\S+%", out, re.M)}
    config = TrainConfig(max_steps=1000, warmup_steps=200, max_lr=1e-3)
    assert {0, 200, 1000} <= set(rows)
    assert 12 <= len(rows) <= 20
    for step, lr in rows.items():
        assert lr == pytest.approx(lr_at(step, config), rel=1e-3)
    assert "2,048,000 tokens" in out
    assert "wrote schedule.png" in out
    assert "20 %" in err
    assert "--warmup_steps 10 to 50" in err
    assert (tmp_path / "schedule.png").stat().st_size > 5000


@pytest.mark.pictures
def test_command_takes_presets_and_refuses_nonsense(tmp_path, capsys):
    out = tmp_path / "s.svg"
    assert main(["schedule", "--preset", "shakespeare-char-cpu", "--out", str(out)]) == 0
    assert "2,000 steps" in capsys.readouterr().out
    assert main(["schedule", "--warmup_steps", "5000", "--out", str(out)]) == 2
    assert "warmup_steps" in capsys.readouterr().err
    assert main(["schedule", "--out", "curve.gif2"]) == 2
    assert ".png" in capsys.readouterr().err


def test_table_of_a_tiny_run():
    assert "100.0%" in command.table(TrainConfig(max_steps=1))


def test_the_cool_down_of_the_documented_fork_begins_at_the_fork():
    page = (ROOT / "docs" / "try.md").read_text(encoding="utf-8")
    step, last = map(int, re.search(r"fork runs/stable --at (\d+) --max_steps (\d+)", page).groups())
    assert decay_start(TrainConfig(max_steps=last, schedule="wsd")) == step
