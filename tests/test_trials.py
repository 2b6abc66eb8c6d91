"""A try: combinations, seeds, what stops early, going on after an interrupt, table, picture and best setting."""

import asyncio
import itertools
import json
import os
import shutil
import statistics
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import append, flags

from llm.commands import trials
from llm.commands.look.watch import in_words
from llm.config import from_settings, read_toml
from llm.experiments import jobs, rounds
from llm.experiments.outcome import differences_from, outcomes, step_at
from llm.experiments.picture import draw_try
from llm.experiments.trials import combinations, make_setting, parse_vary, read_try
from llm.page.comparison import FollowedTry, runs_of
from llm.plan.timing import Pace
from llm.record.metrics import losses, read_record
from llm.report import write_try
from llm.storage import lines
from llm.storage.checkpoint import saved_steps

SMALL = flags(n_layer=1, sample_tokens=0).replace("--max_lr 0.01 ", "")
RATES = "--vary max_lr=3e-2,1e-2,1e-5"


def try_line(rest, out_dir="t"):
    return f"try text.txt {SMALL} {rest} --out_dir {out_dir}"


@pytest.mark.pictures
def test_a_try_ends_with_table_picture_verdicts_and_best(here, losscurve):
    code, out, err = losscurve(try_line(f"{RATES} --seeds 3"))
    assert code == 0, err
    tried = read_try(here / "t")
    assert [setting.changes for setting in tried.settings] == [{"max_lr": 3e-2}, {"max_lr": 1e-2}, {"max_lr": 1e-5}]
    ranked = [line.split()[0] for line in out.splitlines() if line.startswith("max_lr")]
    assert ranked == ["max_lr=0.03", "max_lr=0.01", "max_lr=1e-05"]
    assert "the best" in out.splitlines()[1]
    assert "stopped at step 8: worse by" in out
    assert saved_steps(here / "t" / "max_lr=1e-05" / "seed-1338")[-1] == 8
    assert saved_steps(here / "t" / "max_lr=0.03" / "seed-1338")[-1] == 12
    best = read_toml(str(here / "t" / "best.toml"))
    assert (best["max_lr"], best["seed"], best["out_dir"]) == (3e-2, 1337, "checkpoints")
    assert best["text"] == (str(here / "text.txt"),)  # so it trains from any folder
    panels = [axes.get_title(loc="left") for axes in draw_try(tried, outcomes(tried)).axes]
    assert [title.partition("\n")[0] for title in panels if title] == ranked
    assert (here / "t" / "try.png").stat().st_size > 5000

    # each is the run that train would make
    code, _, err = losscurve(f"train text.txt {SMALL} --max_lr 0.03 --seed 1338 --out_dir alone")
    assert code == 0, err
    ours, theirs = (losses(read_record(here / name), "val") for name in ("t/max_lr=0.03/seed-1338", "alone"))
    assert ours == theirs  # though it paused twice

    # the same again finds all there; more values and seeds are added to what is there
    stamp = (here / "t/max_lr=0.03/seed-1337/model.pt").stat().st_mtime_ns
    code, again, err = losscurve(try_line(f"{RATES} --seeds 3"))
    assert (code, again) == (0, out)
    assert "1 of" not in err
    code, _, err = losscurve(try_line(f"{RATES},2e-2 --seeds 3 --keep_all"))
    assert code == 0, err
    assert "1 of 3: max_lr=0.02, seed 1337" in err
    code, more, err = losscurve(try_line(f"{RATES},2e-2 --seeds 4"))
    assert code == 0, err
    assert "3 of 3: max_lr=0.02, seed 1340" in err
    assert "stopped" not in err  # what is complete cannot stop, though it is judged with one seed more now
    assert "stopped at step 8: worse by" in more
    assert (here / "t/max_lr=0.03/seed-1337/model.pt").stat().st_mtime_ns == stamp


def test_a_try_goes_on_after_an_interrupt(here, losscurve, monkeypatch):
    line = try_line("--vary n_layer=1,2 --seeds 2").replace("--n_layer 1 ", "")
    seen = itertools.count()
    real = rounds.train_jobs
    monkeypatch.setattr(
        rounds, "train_jobs", lambda left, n, stop, skip: real(left, n, lambda: stop() or next(seen) > 20, skip)
    )
    monkeypatch.setattr("llm.run.signal.signal", lambda number, handler: None)
    losscurve(line)
    half = {path.parent.name + path.name: saved_steps(path)[-1] for path in here.glob("t/*/seed-*")}
    assert 0 < len(half) < 4
    assert min(half.values()) < 12
    monkeypatch.undo()
    monkeypatch.chdir(here)
    shutil.rmtree(here / "t/n_layer=2/seed-1337", ignore_errors=True)
    (here / "t/n_layer=2/seed-1337").mkdir(parents=True)
    (here / "t/n_layer=2/seed-1337/config.toml").write_text("max_steps = 12\n")  # killed before its first save
    code, out, err = losscurve(line)
    assert code == 0, err
    assert (
        losscurve(try_line("--vary n_layer=1,2 --seeds 2", "whole").replace("--n_layer 1 ", ""))[1].splitlines()[:3]
        == out.splitlines()[:3]
    )


def test_several_at_once_are_the_same_runs(here, losscurve):
    rest = "--vary max_lr=1e-2,1e-3 --seeds 1"
    code, out, err = losscurve(try_line(f"{rest} --jobs 2", "two"))
    assert code == 0, err
    assert out.splitlines()[:3] == losscurve(try_line(rest, "one"))[1].splitlines()[:3]
    assert "OMP_NUM_THREADS" in os.environ


def test_the_pace_of_several_is_measured_with_all_of_them_at_work(tmp_path, monkeypatch):
    sent, paces = [], iter([Pace(0.1, 0, 0), Pace(0.3, 0, 0), Pace(0.2, 0, 0)])

    class Process:
        def send(self, task):
            sent.append(task)

        def recv(self):
            assert len(sent) == 3
            return next(paces), None

    monkeypatch.setattr(jobs, "other_processes", lambda count, of: nullcontext([Process() for _ in range(count)]))
    with jobs.slowest_pace(3) as measure:
        assert measure(from_settings({}), 1.0) == Pace(0.3, 0, 0)


def made(folder, levels, seeds=3, steps=(4, 8, 12), every=4):
    """A try whose runs have the given losses at each evaluation: levels[name](seed number, step)."""
    from llm.experiments.trials import Try

    settings = [make_setting({"max_lr": rate}) for rate in levels]
    tried = Try(folder, {}, {"max_steps": 12, "eval_every": every, "warmup_steps": 2}, list(range(seeds)), settings)
    for setting, (rate, level) in zip(settings, levels.items(), strict=True):
        for number in tried.seeds:
            run = tried.run_dir(setting, number)
            run.mkdir(parents=True)
            own = f'seed = {number}\nmax_lr = {rate}\nout_dir = "{run}"\n'
            (run / "config.toml").write_text(f"max_steps = 12\neval_every = {every}\n{own}")
            (run / "env.json").write_text('{"data": {"val.bin": "a hash"}}')
            for step in steps:
                append(run, step=step, split="val", loss=level(number, step))
                (run / f"step-{step:06d}").mkdir()
    tried.save()
    return tried


def test_what_is_clearly_behind_stops_and_nothing_else(tmp_path):
    """The seeds differ by more than the settings; only pairs show which is behind."""
    seed_luck = [0.0, 0.3, 0.1]
    levels = {
        1e-2: lambda s, step: 2 + seed_luck[s],
        2e-2: lambda s, step: 2.002 + seed_luck[s] + [0.004, -0.004, 0.002][s],  # chance
        3e-2: lambda s, step: 2.05 + seed_luck[s] + [0.001, -0.001, 0.0][s],  # clearly behind
        4e-2: lambda s, step: 2.2 + seed_luck[s] + [0.5, -0.19, 0.3][s],  # far behind, but not surely
    }
    tried = made(tmp_path, levels, steps=(4,))
    said = []
    rounds.stop_behind(tried, tried.settings, 1 / 3, said.append)
    assert list(tried.stopped) == ["max_lr=0.03"]
    assert said[0].startswith("stopped max_lr=0.03 at step 4: worse by 0.0500 (0.0")
    assert said[0].endswith("than max_lr=0.01")
    assert read_try(tmp_path).stopped == tried.stopped


def test_a_setting_is_judged_once_at_each_look_and_never_when_it_is_complete(tmp_path):
    levels = {rate: lambda s, step, rate=rate: 3 + rate + 0.001 * s * rate - step / 100 for rate in (1e-2, 2e-2, 3e-2)}
    tried = made(tmp_path, levels)
    rounds.stop_behind(tried, tried.settings, 1 / 3, lambda line: None)
    assert not tried.stopped
    assert [outcome.mean is not None for outcome in outcomes(tried)] == [True, True, True]
    # a new setting is behind them at equal steps, though complete they would be far ahead of one that is better
    slow, fast = {4e-2: lambda s, step: 3.02 + 0.001 * s}, {5e-2: lambda s, step: 2.95 + 0.001 * s}
    for new in (slow, fast):
        added = made(tmp_path, new, steps=(4,))
        tried.settings.append(added.settings[0])
    rounds.stop_behind(tried, tried.settings, 1 / 3, lambda line: None)
    assert list(tried.stopped) == ["max_lr=0.04"]
    assert tried.stopped["max_lr=0.04"]["words"].endswith("than max_lr=0.05")
    # the same again, as after an interrupt, judges nobody anew
    tried.stopped.clear()
    rounds.stop_behind(tried, tried.settings, 1 / 3, lambda line: None)
    assert not tried.stopped


def test_never_more_than_the_worse_half_stops(tmp_path):
    levels = {
        rate: lambda s, step, rate=rate: 2 + 10 * rate + 0.001 * s * rate for rate in (1e-2, 2e-2, 3e-2, 4e-2, 5e-2)
    }
    tried = made(tmp_path, levels, steps=(4, 8))
    rounds.stop_behind(tried, tried.settings, 1 / 3, lambda line: None)
    assert sorted(tried.stopped) == ["max_lr=0.04", "max_lr=0.05"]
    rounds.stop_behind(tried, tried.settings, 2 / 3, lambda line: None)
    assert sorted(tried.stopped) == ["max_lr=0.03", "max_lr=0.04", "max_lr=0.05"]


def test_the_first_setting_never_stops_if_it_is_the_reference(tmp_path):
    levels = {5e-2: lambda s, step: 3 + 0.01 * s, 1e-2: lambda s, step: 2 + 0.0101 * s}
    for against, stopped in (("best", ["max_lr=0.05"]), ("first", [])):
        tried = made(tmp_path / against, levels, steps=(4,))
        tried.against = against
        rounds.stop_behind(tried, tried.settings, 1 / 3, lambda line: None)
        assert list(tried.stopped) == stopped
    tried = made(tmp_path / "whole", levels)
    tried.against = "first"
    best, first = outcomes(tried)
    assert best.words.startswith("better by 0.9999")
    assert first.words == "the first"


def test_nothing_stops_by_its_loss_at_step_0(tmp_path, monkeypatch):
    """With an evaluation every 6 of 12 steps, the only one within a third of them is that of step 0."""
    levels = {1e-2: lambda s, step: 2 + 0.1 * s, 2e-2: lambda s, step: 3 + 0.1001 * s}
    tried = made(tmp_path / "t", levels, steps=(0, 6), every=6)
    rounds.stop_behind(tried, tried.settings, 1 / 3, lambda line: None)
    assert (tried.stopped, tried.judged) == ({}, {})
    rounds.stop_behind(tried, tried.settings, 2 / 3, lambda line: None)
    assert list(tried.stopped) == ["max_lr=0.02"]
    asked = []
    monkeypatch.setattr(rounds, "train_jobs", lambda left, *rest: asked.append({job.share for job in left}) or [])
    new = made(tmp_path / "new", levels, steps=(), every=6)
    rounds.train_settings(new, new.settings, frozenset(), 1, lambda: False, print, checks=True)
    assert asked == [set(), {2 / 3}, {1.0}]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_setting_that_cannot_go_on_trains_no_other_seed(tmp_path, monkeypatch, processes):
    trained, asked = [], {}

    def train_job(job, stop):
        trained.append(job.run_dir.relative_to(tmp_path).as_posix())
        return "it diverged" if "0.02" in trained[-1] else ""

    monkeypatch.setattr(jobs, "train_job", train_job)
    monkeypatch.setattr(jobs, "other_processes", lambda count, of: nullcontext(list(range(count))))
    monkeypatch.setattr(jobs, "ask", lambda connection, task: asked.update({connection: task[1]}))
    monkeypatch.setattr(jobs, "wait", lambda connections, timeout: connections)
    monkeypatch.setattr(jobs, "answer", lambda connection: train_job(asked[connection], None))
    tried = made(tmp_path, dict.fromkeys((1e-2, 2e-2)), steps=())
    rounds.train_settings(tried, tried.settings, frozenset(), processes, lambda: False, print, checks=False)
    assert trained == [f"max_lr=0.0{name}" for name in ("1/seed-0", "2/seed-0", "1/seed-1", "1/seed-2")]
    assert tried.stopped["max_lr=0.02"] == {"step": 0, "words": "cannot go on: it diverged"}


def test_losses_that_do_not_compare_get_no_verdict(here, losscurve):
    line = try_line("--vary block_size=8,16 --seeds 2 --eval_tokens 100").replace("--block_size 16 ", "")
    code, out, err = losscurve(line)
    assert code == 0, err
    told = "stopped at step 12: not comparable with block_size=8: another evaluation (block_size 8 and 16"
    assert told in out
    assert len(list(here.glob("t/block_size=16/*"))) == 1
    assert len(list(here.glob("t/block_size=8/*"))) == 2


def test_the_checks_are_evaluations(here):
    config = from_settings({"max_steps": 100, "eval_every": 30, "warmup_steps": 1})
    assert [step_at(config, share) for share in (1 / 3, 2 / 3, 1)] == [30, 60, 100]


def test_combinations_and_their_names():
    vary = parse_vary(["n-layer=2,4", "learning_rate=1e-3,0.01"])
    assert [setting.name for setting in combinations(vary)] == [
        *("n_layer=2,max_lr=0.001", "n_layer=2,max_lr=0.01"),
        *("n_layer=4,max_lr=0.001", "n_layer=4,max_lr=0.01"),
    ]
    assert make_setting({"init_from": "a b/../c*"}).name == "init_from=a_b_.._c_"


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("", "nothing to compare; give --vary max_lr=1e-3,3e-3"),
        ("--vary max_lr", "vary = 'max_lr': expected a setting and its values, such as max_lr=1e-3,3e-3"),
        ("--vary max_lr=1e-3,,2", "vary = 'max_lr=1e-3,,2': expected a setting and its values"),
        ("--vary max_lr=1e-3,0.001", "vary = 'max_lr=1e-3,0.001': the same value twice"),
        ("--vary max_lt=1,2", "unknown setting 'max_lt'; did you mean 'max_lr'?"),
        ("--vary seed=1,2", "--vary seed: is the same for all settings; give the number of seeds by --seeds"),
        ("--vary text=a,b", "--vary text: would make losses that do not compare"),
        ("--vary n_embd=15,16", "n_embd = 15 is not divisible by n_head = 2"),
        ("--vary max_lr=1,2 --vary learning_rate=3", "--vary max_lr: given twice; give all its values at once"),
        ("--vary max_lr=1,2 --seeds 0", "seeds = 0: expected 1 to 1000"),
        ("--vary max_lr=1,2 --trials 3", "--trials: is the number of settings of a --search"),
        ("--search max_lr=1e-3", "search = 'max_lr=1e-3': expected a setting and a range, such as max_lr=1e-4..1e-2"),
        ("--search max_lr=2..1", "search = 'max_lr=2..1': the first number must be below the second"),
        ("--search arch=a..b", "--search arch: is no number; give its values by --vary arch=…"),
    ],
)
def test_bad_requests_are_one_line(here, losscurve, typed, told):
    code, _, err = losscurve(try_line(typed))
    assert code == 2
    assert told in err
    assert not list(here.glob("t/*/*"))


def test_another_request_in_the_same_folder_is_refused(tmp_path, losscurve):
    tried = made(tmp_path / "t", {1e-2: lambda s, step: 2.0})
    tried.asked = {"given": {"n_layer": 1}, "preset": {}, "first seed": 1337, "search": []}
    preset = tmp_path / "my.toml"
    preset.write_text('schedule = "linear"\n')
    tried.save()
    code, _, err = losscurve(f"try --n_layer 2 --vary max_lr=1e-2 --out_dir {tmp_path / 't'}")
    assert code == 2
    assert "t: holds another try: n_layer was 1 and is 2 now; to go on with it give the same, otherwise choose" in err
    line = f"try --n_layer 1 --vary max_lr=1e-2 --out_dir {tmp_path / 't'}"
    code, _, err = losscurve(f"{line} --seed 5 --dropout 0.1 --preset {preset}")
    assert "schedule was cosine and is linear now, dropout was 0.0 and is 0.1 now, first seed was 1337 and is 5" in err
    code, _, err = losscurve(f"{line} --seeds 2")
    assert (code, "seeds = 2: " in err, "has 3 seeds of each setting; give that many or more" in err) == (2, True, True)
    (tmp_path / "t" / "try.json").write_text("[]")
    assert "not what losscurve try writes" in losscurve(f"try --vary max_lr=1e-2 --out_dir {tmp_path / 't'}")[2]


def test_optuna_chooses_and_goes_on(here, losscurve):
    pytest.importorskip("optuna")
    line = try_line("--search max_lr=1e-5..1e-1 --vary n_layer=1,2 --seeds 1 --max_steps 4").replace("--n_layer 1 ", "")
    line = line.replace("--max_steps 12 ", "")
    assert losscurve(f"{line} --trials 2")[0] == 0
    code, _, err = losscurve(f"{line} --trials 4")
    assert code == 0, err
    assert "1 of 1: 003-max_lr=" in err
    assert "000-" not in err
    assert len(read_try(here / "t").settings) == 4
    rates = [setting.changes["max_lr"] for setting in read_try(here / "t").settings]
    assert len(set(rates)) == 4
    assert all(1e-5 <= rate <= 1e-1 for rate in rates)


def test_a_search_that_drew_what_cannot_be_goes_on(here, losscurve):
    pytest.importorskip("optuna")
    line = try_line("--search n_embd=11..20 --seeds 1 --max_steps 4").replace("--n_embd 16 ", "")
    line = line.replace("--max_steps 12 ", "")
    for count in (4, 8):
        code, out, err = losscurve(f"{line} --trials {count}")
        assert code == 0, err
        assert len(read_try(here / "t").settings) == count
        assert 0 < out.count("cannot be: n_embd = 1") < count  # the odd ones, with two heads


def test_a_search_gets_more_seeds_and_keeps_its_choices(here, losscurve, monkeypatch):
    create = pytest.importorskip("optuna").create_study
    studies = []
    monkeypatch.setattr("optuna.create_study", lambda **given: studies.append(create(**given)) or studies[-1])
    line = try_line("--search max_lr=1e-5..1e-1 --vary n_layer=1,2 --trials 2 --max_steps 4 --seeds 1")
    line = line.replace("--n_layer 1 ", "").replace("--max_steps 12 ", "")
    assert losscurve(line)[0] == 0
    before = [setting.changes for setting in read_try(here / "t").settings]
    code, out, err = losscurve(line.replace("--seeds 1", "--seeds 2"))
    assert code == 0, err
    assert err.count("seed 1338") == 2
    assert "not finished" not in out
    assert [trial.params for trial in studies[-1].trials] == before  # what Optuna knows is what was trained
    assert all(trial.value is not None for trial in studies[-1].trials)
    assert [setting.changes for setting in read_try(here / "t").settings] == before
    code, _, err = losscurve(line.replace("n_layer=1,2", "n_layer=1,2,3"))
    assert (code, "holds another try: vary was n_layer=1,2 and is n_layer=1,2,3 now" in err) == (2, True)


def test_a_save_that_failed_ends_the_try_and_the_same_command_goes_on(here, losscurve, monkeypatch):
    def train(run):
        yield from real(run)
        run.unsaved = "step 12 (No space left on device)"

    real = jobs.train
    line = try_line("--vary max_lr=1e-2,1e-3 --seeds 1")
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "train", train)
        code, _, err = losscurve(line)
    assert code == 1
    assert err.splitlines()[-1] == (
        "error: t/max_lr=0.01/seed-1337: the last save failed: step 12 (No space left on device); free some disk "
        "space, and the same command goes on"
    )
    code, out, err = losscurve(line)
    assert code == 0, err
    assert "stopped" not in out


@pytest.mark.parametrize("together", [1, 2])
def test_what_the_disk_refuses_is_said_whichever_process_it_was(here, losscurve, together):
    line = try_line(f"--vary max_lr=1e-2,1e-3 --seeds 1 --jobs {together}")
    assert losscurve(line)[0] == 0
    run = here / "t" / "max_lr=0.01" / "seed-1337"
    shutil.rmtree(run)
    (run / "model.pt" / "something").mkdir(parents=True)  # no file can take its place
    code, _, err = losscurve(line)
    assert code == 1
    assert "seed-1337/model.pt: Is a directory" in err.splitlines()[-1]


def test_without_optuna_one_line_says_how_to_get_it(here, losscurve, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    code, _, err = losscurve(try_line("--search max_lr=1e-4..1e-2"))
    assert code == 2
    assert err.strip() == 'error: --search needs optuna; pip install "losscurve[search]"'
    assert not (here / "t" / "try.json").exists()


def test_time_is_divided(here, losscurve, monkeypatch):
    """20 s for 2 settings of 2 seeds: each run gets 5 s, around the settings that are chosen for one of them."""
    asked = []
    muon = {"optimizer": "muon", "muon_lr": 0.03}
    chosen = from_settings({"text": "text.txt", **settings_of(flags(n_layer=1, max_steps=8)), **muon})

    def choose(request, overwrite, say, progress, measure):
        asked.append(request.seconds)
        assert measure is None
        return SimpleNamespace(
            proposal=SimpleNamespace(config=chosen), deadline=lambda began: SimpleNamespace(most_steps=9)
        )

    monkeypatch.setattr("llm.plan.autopilot.choose_new_run", choose)
    monkeypatch.setattr("llm.plan.choice_lines.choice_lines", lambda choice: ["chosen"])
    line = "try text.txt --vary max_lr=1e-2,1e-3 --seeds 2 --time 20s --out_dir t"
    code, out, err = losscurve(line)
    assert code == 0, err
    assert asked == [5]
    assert "4 runs of 5 s each" in out
    assert "muon_lr = 0.03 in all settings: vary that with --vary muon_lr=0.015,0.03" in err
    assert out.splitlines()[-1].endswith("next: losscurve train --preset t/best.toml --time 10m")
    assert read_toml("t/best.toml").keys() == {"text", "max_lr"}  # what was asked for, and not 8 steps
    tried = read_try(here / "t")
    assert (tried.seconds, tried.most_steps) == (5, 9)
    # far faster than 5 s, so the runs got longer, up to what is useful
    assert {read_toml(str(path / "config.toml"))["max_steps"] for path in here.glob("t/*/*")} <= {8, 9}
    code, _, err = losscurve(line.replace("20s", "30s"))
    assert code == 2
    assert "holds another try: time was 20s and is 30s now" in err
    assert losscurve(line)[0] == 0
    assert asked == [5]


def test_the_seed_of_a_preset_is_the_first(tmp_path):
    (tmp_path / "my.toml").write_text("seed = 5\n")
    for flag, seeds in (("", [5, 6]), ("--seed 8", [8, 9])):
        line = f"--preset {tmp_path / 'my.toml'} {flag} --seeds 2 --vary max_lr=1e-2 --out_dir {tmp_path / 't'}"
        assert trials.open_try(trials.parse(line.split()), tmp_path / "t", [], 0).seeds == seeds


def test_the_next_command_can_be_pasted(tmp_path, capsys):
    made(tmp_path / "my try", {1e-2: lambda s, step: 2.0})
    trials.finish(tmp_path / "my try")
    assert f"losscurve train --preset '{tmp_path / 'my try' / 'best.toml'}'" in capsys.readouterr().out


def settings_of(line):
    words = line.replace("--", "").split()
    return dict(zip(words[::2], words[1::2], strict=True))


def test_the_report_and_the_page_of_a_try(tmp_path, losscurve):
    tried = made(tmp_path / "t", {1e-2: lambda s, step: 2.0 + 0.01 * s, 3e-2: lambda s, step: 3.0 + 0.011 * s})
    tried.stopped["max_lr=0.03"] = {"step": 4, "words": "worse by <b>1</b>"}
    tried.save()
    code, _, err = losscurve(f"report {tmp_path / 't'}")
    assert code == 0, err
    html = (tmp_path / "t" / "report.html").read_text(encoding="utf-8")
    assert "2 settings, 3 seeds each; the best is <bdi>max_lr=0.01</bdi>" in html
    assert "stopped at step 4: worse by &lt;b&gt;1&lt;/b&gt;" in html
    assert str(tmp_path) not in html
    assert "max_lr = 0.01" in html
    for flag, value in (("--format", " md"), ("--data_dir", " d"), ("--no_memorised", "")):
        code, _, err = losscurve(f"report {tmp_path / 't'} {flag}{value}")
        assert (code, err.count("\n"), f"leave {flag}" in err) == (2, 1, True)
    assert [path.relative_to(tmp_path).as_posix() for path in runs_of(tmp_path / "t")] == [
        f"t/max_lr={rate}/seed-{seed}" for rate in ("0.01", "0.03") for seed in range(3)
    ]
    assert runs_of(tmp_path) == [tmp_path]
    assert in_words(tmp_path / "t") == f"{tmp_path / 't'} (6 runs)"
    followed = FollowedTry(tmp_path / "t")
    answer = followed.answer()
    assert [row[0] for row in answer["rows"]] == ["setting", "max_lr=0.01", "max_lr=0.03"]
    assert answer["picture"].startswith("data:image/png;base64,")
    assert followed.answer() is answer  # nothing has changed, so it is not drawn again
    append(tmp_path / "t/max_lr=0.01/seed-0", step=12, split="val", loss=1.0)
    assert followed.answer()["rows"][1][1] == "1.6767"  # (1 + 2.01 + 2.02) / 3
    (tmp_path / "t" / "try.json").write_text("[]")
    assert "not what losscurve try writes" in followed.answer()["error"]


def test_the_page_follows_the_settings_that_a_search_adds(tmp_path):
    server = pytest.importorskip("llm.page.server", exc_type=ImportError)
    tried = made(tmp_path / "t", {1e-2: lambda s, step: 2.0}, seeds=1)
    page = server.Page([tmp_path / "t"])
    assert [run.name for run in page.runs] == ["seed-0"]
    tried.settings += made(tmp_path / "t", {2e-2: lambda s, step: 2.0}, seeds=1).settings
    tried.save()
    page.ended.set()

    async def messages():
        return [message async for message in page.changes()]

    found = [json.loads(message.split("data: ")[1]) for message in asyncio.run(messages()) if "event: run" in message]
    assert [(message["run"], message["facts"]["name"]) for message in found] == [
        (place, str(tmp_path / "t" / f"max_lr={rate}" / "seed-0")) for place, rate in enumerate(("0.01", "0.02"))
    ]


@pytest.mark.parametrize(("against", "mean"), [("best", 1.001), ("first", -1.001)])
def test_the_report_draws_the_paired_difference(tmp_path, losscurve, monkeypatch, against, mean):
    """By hand: 1 + 0.001 x (0 + 1 + 2) / 3, although the seeds differ by 0.01."""
    tried = made(tmp_path / "t", {3e-2: lambda s, step: 3.0 + 0.011 * s, 1e-2: lambda s, step: 2.0 + 0.01 * s})
    tried.against = against
    tried.save()
    drawn = []
    monkeypatch.setattr(write_try, "data_url", lambda figure: drawn.append(figure) or "data:,")
    read = []
    monkeypatch.setattr(
        lines, "read", lambda path, parse, read_lines=lines.read: read.append(path) or read_lines(path, parse)
    )
    assert losscurve(f"report {tmp_path / 't'}")[0] == 0
    records = sorted(path for path in read if path.name == "metrics.jsonl")
    assert records == sorted((tmp_path / "t").glob("*/*/metrics.jsonl"))  # each once
    _, figure = drawn  # the small multiples before
    lower = figure.axes[1]
    (curve,) = [line for line in lower.lines if len(line.get_xdata()) == 3]
    assert list(curve.get_xdata()) == [4, 8, 12]
    assert curve.get_ydata() == pytest.approx([mean] * 3)
    (band,) = lower.collections
    top, bottom = band.get_paths()[0].vertices[:, 1].max(), band.get_paths()[0].vertices[:, 1].min()
    assert (top - bottom) / 2 == pytest.approx(4.3027 * 0.001 / 3**0.5, rel=1e-4)  # Student's t of 2 degrees
    html = (tmp_path / "t" / "report.html").read_text(encoding="utf-8")
    names = ["max_lr=0.01", "max_lr=0.03"] if against == "best" else ["max_lr=0.03", "max_lr=0.01"]
    drawn_names = sorted(text.get_text() for text in figure.axes[0].texts if "max_lr" in text.get_text())
    assert [name.split()[-1] for name in drawn_names] == names
    assert f"differences from A, <bdi>{names[0]}</bdi>" in html
    for path in tried.run_dir(tried.settings[0], 0).parent.glob("*/metrics.jsonl"):
        path.rename(path.with_name("hidden"))  # without a record of the first setting, nothing compares with it
    assert losscurve(f"report {tmp_path / 't'}")[0] == 0
    assert "Differences" not in (tmp_path / "t" / "report.html").read_text(encoding="utf-8")
    for path in tried.run_dir(tried.settings[0], 0).parent.glob("*/hidden"):
        path.rename(path.with_name("metrics.jsonl"))
    for path in (tmp_path / "t").glob("*/*/env.json"):
        path.unlink()  # then nothing says that their texts are one
    assert losscurve(f"report {tmp_path / 't'}")[0] == 0
    assert "Differences" not in (tmp_path / "t" / "report.html").read_text(encoding="utf-8")
    tried.settings = []  # as of a search that has just begun
    tried.save()
    code, _, err = losscurve(f"report {tmp_path / 't'}")
    assert code == 0, err


def test_every_column_of_panels_has_its_steps(tmp_path):
    """Five panels in four columns: three columns end with the first row."""
    rates = (1e-2, 2e-2, 3e-2, 4e-2, 5e-2)
    tried = made(tmp_path, {rate: lambda s, step: 3.0 - step / 12 for rate in rates})
    figure = draw_try(tried, outcomes(tried))
    figure.canvas.draw()
    panels = [panel for panel in figure.axes if panel.get_visible()]
    has_steps = [any(label.get_visible() and label.get_text() for label in p.get_xticklabels()) for p in panels]
    assert has_steps == [False, True, True, True, True]


@pytest.mark.parametrize("against", ["best", "first"])
def test_settings_without_a_difference_are_rarely_called_different(against):
    """1,000 tries of six equal settings with three seeds: at 5 %, more than 75 alarms have a chance of 1 in 5,000."""
    draws = np.random.default_rng(0)
    alarms = 0
    for _ in range(1000):
        known = {f"s{i}": list(draws.normal(0, 1, 3)) for i in range(6)}
        best = min(known, key=lambda name: statistics.fmean(known[name]))
        found = differences_from(best if against == "best" else "s0", known, against)
        alarms += any(difference.is_real for difference in found.values())
    assert alarms <= 75


@pytest.mark.parametrize("count", [2, 6])
def test_equal_settings_rarely_stop_at_either_of_the_two_looks(count):
    """1,000 tries of equal settings with three seeds: at 5 %, more than 68 have a chance of 1 in 200."""
    draws = np.random.default_rng(count)
    tries_that_stop_one = 0
    for _ in range(1000):
        losses, alive = draws.normal(0, 1, 3) + draws.normal(0, 1, (count, 3)), list(range(count))
        for _ in rounds.CHECKS:
            _, behind = rounds.find_behind({str(i): losses[i].tolist() for i in alive})
            alive = [i for i in alive if str(i) not in behind]
            losses = losses + draws.normal(0, 1, (count, 3))
        tries_that_stop_one += len(alive) < count
    assert tries_that_stop_one <= 68


def test_a_folder_with_other_files_is_refused_and_a_wrong_text_leaves_it_free(here, losscurve):
    (here / "mine").mkdir()
    (here / "mine" / "best.toml").write_text("my own")
    code, _, err = losscurve(try_line("--vary max_lr=1e-2 --seeds 1", "mine"))
    assert (code, err) == (2, "error: mine: holds other files; choose another --out_dir for the try\n")
    assert (here / "mine" / "best.toml").read_text() == "my own"
    assert losscurve(try_line("--vary max_lr=1e-2 --seeds 1").replace("text.txt", "none.txt"))[0] == 2
    code, _, err = losscurve(try_line("--vary max_lr=1e-2 --seeds 1"))
    assert code == 0, err
