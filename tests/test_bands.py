"""Reference bands: that they cover what they say, and speak only of runs that are theirs."""

import json
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
from conftest import append, flags

from benchmarks.bands import make_band, to_json, train
from llm import storage
from llm.config import TrainConfig, from_settings, read_toml
from llm.record import bands
from llm.record.bands import STUDENT, Band, band_from_reference, band_of, band_of_run, band_verdict, shaping
from llm.record.explain import News, explain
from llm.record.plot import draw_run

BAND = Band("chapter", 3, (0, 250, 500), (10.8, 5.8, 5.1), (0.01, 0.05, 0.02))
SHIPPED = [
    file.name for file in resources.files("llm.record").joinpath("reference").iterdir() if file.name.endswith(".json")
]


def rows(*losses, every=250):
    return [
        {"step": i * every, "split": "val", "loss": x, "bits_per_byte": None, "lr": None} for i, x in enumerate(losses)
    ]


@pytest.mark.parametrize("runs", sorted(STUDENT))
def test_one_more_run_lies_inside_19_times_of_20_or_more(runs):
    draw, inside, trials = np.random.default_rng(runs), 0, 2000
    for _ in range(trials):
        losses = draw.normal(5, 0.1, (runs + 1, 1))
        facts = {"preset": "p", "steps": [0], "val": {str(i): list(row) for i, row in enumerate(losses[:-1])}}
        low, high = band_from_reference(facts).at(0)
        inside += low <= losses[-1, 0] <= high
    assert abs(inside / trials - 0.95) < 0.016  # 3.3 standard errors


def test_the_quantile_of_three_runs_is_that_of_student_in_closed_form():
    p = 0.975  # two degrees of freedom: t = (2p - 1) √(2 / (4 p (1 - p)))
    assert STUDENT[3] == pytest.approx((2 * p - 1) * (2 / (4 * p * (1 - p))) ** 0.5, abs=1e-3)


def test_the_spread_is_averaged_with_the_neighbours():
    facts = {"preset": "p", "steps": [0, 1, 2], "val": {"1": [1.0, 1.0, 1.0], "2": [1, 1, 1], "3": [1, 1, 1.3]}}
    band = band_from_reference(facts)
    variance = np.var([1, 1, 1.3], ddof=1)
    factor = STUDENT[3] * (1 + 1 / 3) ** 0.5
    assert band.half_width == pytest.approx([0, factor * (variance / 3) ** 0.5, factor * (variance / 2) ** 0.5])
    assert band.mean == pytest.approx([1, 1, 1.1])


@pytest.mark.parametrize(
    ("losses", "word"),
    [
        ((10.8, 5.8), "inside the reference band"),
        ((10.8, 5.8, 5.119), "inside the reference band"),
        ((10.8, 5.8, 5.13), None),  # once
        ((10.8, 6.0, 5.13), "outside the reference band"),
        ((10.8, 5.0, 4.0), "outside the reference band"),
        ((10.8, 6.0, 5.1), "inside the reference band"),  # came back
        ((10.9,), "outside the reference band"),
        ((), None),
    ],
)
def test_a_run_is_judged_by_its_last_evaluations(losses, word):
    line = band_verdict(rows(*losses), BAND)
    assert line is None if word is None else line.startswith(f"{word}: ")
    if word == "outside the reference band":
        assert ("above" in line) == (losses[-1] > 5.1)


def test_evaluations_missing_in_the_band_are_ignored():
    assert band_verdict(rows(10.8, 99, 5.8, 99, 5.1, every=125), BAND).startswith(
        "inside the reference band: validation loss 5.100"
    )
    assert band_verdict(rows(10.8), None) is None


def test_only_runs_of_the_same_settings_and_data_have_a_band(tmp_path, monkeypatch):
    config = TrainConfig(seed=5, dtype="bfloat16", warmup_steps=100)  # what 2 % of 5,000 is
    facts = {"preset": "chapter", "steps": [0], "val": {"1": [1.0], "2": [2.0], "3": [3.0]}}
    facts |= {"settings": shaping(TrainConfig()), "data": {"train.bin": "a", "val.bin": "b"}}
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "chapter.json").write_text(json.dumps(facts))
    monkeypatch.setattr(bands.resources, "files", lambda package: tmp_path)
    assert band_of(config, {"train.bin": "a", "val.bin": "b"}).mean == (2.0,)
    assert band_of(config, {"train.bin": "a", "val.bin": "c"}) is None
    assert band_of(config, None) is None
    for change in ({"max_lr": 1e-3}, {"batch_size": 16}, {"weight_decay": 0.1}, {"init_from": "x.pt"}):
        assert band_of(replace(config, **change), facts["data"]) is None
    assert band_of(replace(config, model=replace(config.model, dropout=0.1)), facts["data"]) is None


LLAMA = {"arch": "llama", "optimizer": "muon", "schedule": "wsd", "order": "epochs"}


@pytest.mark.parametrize(
    ("made", "given", "has_band"),
    [
        (LLAMA, LLAMA, True),
        (LLAMA, LLAMA | {"n_kv_head": 4, "ffn_dim": 384, "head_dim": 32, "decay_fraction": 0.4}, True),  # the defaults
        (LLAMA | {"n_kv_head": 4, "ffn_dim": 384, "decay_fraction": 0.4}, LLAMA, True),
        (LLAMA, LLAMA | {"ema": 0.99}, True),  # evaluated beside the weights that the band is of
        ({}, {"ema": 0.99}, True),
        (LLAMA, LLAMA | {"n_kv_head": 2}, False),
        (LLAMA, LLAMA | {"head_dim": 16}, False),
        (LLAMA, LLAMA | {"decay_fraction": 0.6}, False),
        (LLAMA, LLAMA | {"muon_lr": 0.03}, False),
        (LLAMA, {}, False),
    ],
)
def test_a_default_that_is_given_shapes_the_same_curve(tmp_path, monkeypatch, made, given, has_band):
    facts = {"preset": "p", "steps": [0], "val": {"1": [1.0], "2": [2.0], "3": [3.0]}, "data": {}}
    (tmp_path / "reference").mkdir()
    settings = shaping(from_settings(made))
    (tmp_path / "reference" / "p.json").write_text(json.dumps(facts | {"settings": settings}))
    monkeypatch.setattr(bands.resources, "files", lambda package: tmp_path)
    assert (band_of(from_settings(given), {}) is not None) == has_band


def test_a_folder_without_its_settings_or_hashes_has_no_band(tmp_path):
    assert band_of_run(tmp_path) is None
    (tmp_path / "config.toml").write_text("")
    assert band_of_run(tmp_path) is None
    storage.write_json(tmp_path / "env.json", [])
    assert band_of_run(tmp_path) is None


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_fits_the_preset_and_each_of_its_runs_lies_inside(name):
    facts = json.loads(resources.files("llm.record").joinpath("reference", name).read_text())
    band = band_from_reference(facts)
    preset = from_settings(read_toml(facts["preset"]) | {"vocab_size": facts["settings"].get("vocab_size")})
    assert shaping(preset) == shaping(TrainConfig()) | facts["settings"]  # newer settings have their defaults
    assert band.runs >= 3
    for losses in facts["val"].values():
        points = rows(*losses, every=band.steps[1])
        assert all(low <= row["loss"] <= high for row in points for low, high in [band.at(row["step"])])
        assert band_verdict(points, band).startswith("inside the reference band")


def test_the_line_is_explained_and_drawn_and_comes_from_runs_that_were_made(here, losscurve, monkeypatch):
    runs = [here / str(seed) for seed in (1, 2, 3, 4)]
    for run in runs:
        assert losscurve(f"train --text text.txt --out_dir {run} --seed {run.name} {flags()}")[0] == 0
    facts = make_band("small", runs[:3])
    assert json.loads(to_json(facts)) == facts
    assert facts["steps"] == [0, 4, 8, 12]
    (here / "reference").mkdir()
    (here / "reference" / "small.json").write_text(to_json(facts))
    monkeypatch.setattr(bands.resources, "files", lambda package: here)
    band = band_of_run(runs[3])
    for end in (facts["val"]["1"][-1], 99.0):
        word = "inside the reference band" if end < 99 else "outside the reference band"
        found = rows(*[facts["val"]["1"][0], end, end, end], every=4)
        assert any(line.startswith(f"{word}: ") for line in explain(found, run_settings(runs[3]), band))
        assert any(f"; {word}" in text.get_text() for text in draw_run(found, "run", None, band).texts)
    assert any("the reference band: " in line for line in losscurve(f"explain {runs[3]}")[1].splitlines())
    for _ in range(2):
        append(runs[3], step=12, split="val", loss=99.0)
    assert any("outside the reference band: " in line for line in News(runs[3], run_settings(runs[3])).at(12))


def test_a_finished_seed_is_not_trained_again(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("benchmarks.bands.subprocess.run", lambda words, check: asked.append(words))
    (tmp_path / "config.toml").write_text("max_steps = 500\n")
    for step in (250, 500):
        append(tmp_path, step=step, split="val", loss=5.0)
        train("chapter", "1", tmp_path, tmp_path)
    assert [words[-1] for words in asked] == ["--resume"]


def run_settings(run):
    return from_settings(read_toml(str(run / "config.toml")))


def test_runs_of_other_settings_are_not_put_into_one_band(here, losscurve):
    assert losscurve(f"train --text text.txt --out_dir a {flags()}")[0] == 0
    assert losscurve(f"train --text text.txt --out_dir b {flags(batch_size=2)}")[0] == 0
    with pytest.raises(ValueError, match="differ in settings"):
        make_band("small", [here / "a", here / "b"])
