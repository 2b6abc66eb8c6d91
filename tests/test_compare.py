"""`losscurve compare`: what repeats a setting, what does not compare, differences against sums by hand, the picture."""

import base64
import dataclasses
import json
import math
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
from conftest import append, config_for, trained

from llm.commands.look.compare import expand
from llm.config import from_settings, to_settings, write_toml
from llm.errors import UserError
from llm.evaluate import Evaluation
from llm.experiments.compare import common_unit, compare, difference_curve
from llm.experiments.comparison_picture import draw_comparisons
from llm.experiments.parts import PARTS, part_evaluations
from llm.experiments.recorded import read_run
from llm.page.comparison import comparison_of
from llm.record.metrics import losses, read_record

DATA = {"train.bin": "t", "val.bin": "v"}


def make(path: str, curve: tuple[float | None, ...], every: int = 10, data: dict[str, str] = DATA, **settings) -> Path:
    """Make a run folder with an evaluation every 10 steps, each 2 seconds later than the one before."""
    run = Path(path)
    run.mkdir(parents=True)
    config = from_settings({"max_steps": 40, "warmup_steps": 0, "data_dir": f"{run}/none"} | settings)
    (run / "config.toml").write_text(write_toml(config), encoding="utf-8")
    (run / "env.json").write_text(json.dumps({"data": data, "machine": "m"}))
    for i, loss in enumerate(curve):
        step = i * every
        bits = None if loss is None else loss / 2
        tokens = step * config.tokens_per_step
        append(run, step=step, split="val", loss=loss, bits_per_byte=bits, tokens=tokens, seconds=2.0 * i)
    return run


def test_token_files_without_a_description_tell_the_size_of_the_split(here):
    """As nanoGPT writes them."""
    Path("tokens").mkdir()
    Path("tokens/val.bin").write_bytes(bytes(2 * 600))
    runs = [read_run(make(f"run{size}", (5.0, 4.0), data_dir="tokens", block_size=size)) for size in (16, 32)]
    assert [run.val_tokens for run in runs] == [600, 600]
    assert common_unit(*runs)[0] == "loss"
    fewer = read_run(make("fewer", (5.0, 4.0), data_dir="tokens", block_size=32, eval_tokens=500))
    assert common_unit(runs[0], fewer)[0] is None


@pytest.fixture
def two_settings(here):
    """Three seeds each of two settings; the second has a larger rate, and losses that are lower by 0.1 to 0.12."""
    for seed, loss in ((1, 3.0), (2, 3.2), (3, 2.9)):
        make(f"a{seed}", (5.0, 4.0, loss), seed=seed)
        make(f"b{seed}", (5.0, 4.1, loss - 0.09 - 0.01 * seed), seed=seed, max_lr=1e-3)
    return here


@pytest.mark.pictures
def test_repetitions_are_paired_by_seed_and_the_numbers_are_those_of_a_sum_by_hand(two_settings, losscurve):
    code, out, err = losscurve("compare b3 a1 a2 b1 a3 b2")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:2] == [
        "A: b3, b1, b2 (seeds 3, 1, 2)",
        "B: a1, a2, a3 (seeds 1, 2, 3): max_lr 0.0003 instead of 0.001",
    ]
    apart = [0.10, 0.11, 0.12]
    error = statistics.stdev(apart) / math.sqrt(3)
    low, high = 0.11 - 4.303 * error, 0.11 + 4.303 * error
    assert "B against A, in 3 pairs of runs with the same seed" in lines
    assert f"  at step 20: worse by 0.110 ({low:.3f} to {high:.3f}) nats per token" in lines
    assert f"  at 4.0 seconds of training: worse by 0.110 ({low:.3f} to {high:.3f}) nats per token" in lines
    assert f"standard error {error:.2g} over 3 pairs, 2 degrees of freedom, p 0.0027, interval 95 %" in out
    assert lines[-1] == "wrote comparison.png"
    assert Path("comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_is_all_runs_below_it(two_settings):
    assert expand([Path(), Path("b1")]) == [Path(name) for name in ("a1", "a2", "a3", "b1", "b2", "b3")]


def test_weights_of_other_steps_and_less_than_a_second_are_told(two_settings, losscurve, monkeypatch):
    part = Evaluation(3.0, 1.5, 100)
    monkeypatch.setattr("llm.experiments.compare.part_evaluations", lambda run, data_dir: [part])
    for run, step in (("a1", 20), ("b1", 8)):
        Path(run, f"step-{step:06d}").mkdir()
    for run in ("a1", "b1"):  # 0, 2 and 4 seconds become hundredths
        record = Path(run, "metrics.jsonl")
        record.write_text(record.read_text().replace('.0, "', 'e-2, "').replace(".0}", "e-2}"))
    _, out, _ = losscurve("compare a1 b1")
    assert "the saved weights (of step 8 against step 20), on 100 validation tokens" in out
    assert "at 0.04 seconds of training" in out


def test_one_seed_each_is_not_known_and_other_seeds_have_no_pairs(two_settings, losscurve):
    _, out, err = losscurve("compare a1 b1")
    assert err == "evaluating b1/model.pt\n"  # before it turns out that it cannot
    assert "at step 20: not known: 0.100 nats per token lower with one seed each" in out
    assert "the saved weights are not compared: b1/none: the run's token files are not there" in out
    assert "Brackets" not in out
    _, out, _ = losscurve("compare a1 a2 b3 b1")
    assert "B against A, without pairs" in out
    assert "note" not in out
    _, out, _ = losscurve("compare a1 b1 b2 b3")
    assert "without a pair, and left out: seed 2, 3" in out


def test_several_settings_or_looks_widen_the_brackets(two_settings, losscurve):
    for seed, loss in ((1, 3.05), (2, 3.2), (3, 2.93)):
        make(f"c{seed}", (5.0, 4.0, loss), seed=seed, dropout=0.1)
    _, alone, _ = losscurve("compare a1 a2 a3 b1 b2 b3")
    _, family, _ = losscurve("compare .")
    assert "better by 0.110 (0.085 to 0.135)" in alone
    assert "better by 0.110 (0.074 to 0.146)" in family  # Student's t for 0.025: 6.205 in place of 4.303
    assert "interval 97.5 %" in family
    assert "C against A" in family
    assert "(Holm's correction)" in family
    _, beside_one_seed, _ = losscurve("compare a1 a2 a3 b1 b2 b3 c1")
    assert "better by 0.110 (0.085 to 0.135)" in beside_one_seed
    assert "Holm" not in beside_one_seed
    _, twice, _ = losscurve("compare a1 a2 a3 b1 b2 b3 --looks 2")
    assert "better by 0.110 (0.074 to 0.146)" in twice
    assert "2 looks at the same question" in twice
    assert losscurve("compare a1 b1 --looks 0") == (2, "", "error: looks = 0: expected 1 or more\n")


def test_brackets_are_explained_only_where_there_are_any(here, losscurve):
    for seed, loss, apart in ((1, 3.0, 0.05), (2, 3.2, -0.01), (3, 2.9, 0.03)):
        make(f"a{seed}", (5.0, 4.0, loss), seed=seed)
        make(f"b{seed}", (5.0, 4.0, loss + apart), seed=seed, max_lr=1e-3)
        make(f"c{seed}", (5.0, 4.0, loss + apart / 2), seed=seed, max_lr=2e-3)
    out = losscurve("compare .")[1]
    assert out.count("no difference larger than") == 4  # at equal steps and seconds
    assert "Brackets" not in out
    assert "brackets" not in out
    assert "More seeds after this are a second look" in out


def test_equal_seconds_need_one_machine_for_all_runs(two_settings, losscurve):
    assert "seconds of training" in losscurve("compare .")[1]
    facts = json.loads(Path("b2/env.json").read_text())
    Path("b2/env.json").write_text(json.dumps(facts | {"machine": "another"}))
    out = losscurve("compare .")[1]
    assert "seconds of training" not in out
    assert "note: the machines differ or are not recorded, so equal seconds are not compared" in out


def fork_of(run: str, step: int, path: str, curve: tuple[float, ...], **before: float) -> Path:
    """Make a run that shares the rows of `run` up to a step, with losses of its own after it."""
    origin = json.loads(Path(run, "env.json").read_text())
    forked_from = {"run": run, "step": step, "state": "", "before": before}
    if "forked_from" in origin:
        forked_from["forked_from"] = origin["forked_from"]
    config = read_run(Path(run)).config
    now = to_settings(config) | {name: 2 * value for name, value in before.items()}
    fork = make(path, (), **{name: value for name, value in now.items() if name != "out_dir"})
    (fork / "env.json").write_text(json.dumps(origin | {"forked_from": forked_from}))
    rows = [row for row in read_record(Path(run)) if row["step"] <= step]
    for i, loss in enumerate(curve, 1):
        place = rows[-1]["step"] + 10 * i
        rows.append({"step": place, "split": "val", "loss": loss, "bits_per_byte": loss / 2, "seconds": 100.0 + i})
    for row in rows:
        append(fork, **row)
    return fork


def test_forks_are_named_and_their_past_counts_as_shared(two_settings, losscurve):
    for seed in (1, 2, 3):
        fork_of(f"a{seed}", 10, f"f{seed}", (2.5 + 0.01 * seed,), max_lr=3e-4)
    code, out, _ = losscurve("compare a1 a2 a3 f1 f2 f3")
    assert code == 0
    assert "B: f1, f2, f3 (seeds 1, 2, 3; forked from a1, a2, a3 at step 10): max_lr 0.0006 instead of 0.0003" in out
    assert "note: B is a fork of A: up to step 10 they are the same run" in out
    groups, _, _ = compare([Path(name) for name in ("a1", "a2", "a3", "f1", "f2", "f3")])
    curve = difference_curve(*groups, "step", "loss")
    assert [place for place, _ in curve] == [10, 20]
    assert (curve[0][1].mean, curve[0][1].standard_error) == (0, 0)
    assert curve[1][1].mean == pytest.approx(2.52 - (3.0 + 3.2 + 2.9) / 3)
    upper = draw_comparisons(groups, compare([Path(name) for name in ("a1", "f1")])[1]).axes[0]
    assert sorted(min(line.get_xdata()) for line in upper.lines if len(line.get_xdata()) > 1)[-1] == 10


def test_forks_of_one_run_and_forks_that_go_no_further(two_settings, losscurve):
    fork_of("a1", 10, "f", (2.5,), max_lr=3e-4)
    fork_of("a1", 10, "g", (2.6,), dropout=0.1)
    fork_of("f", 20, "h", (2.4,), dropout=0.2)
    fork_of("a1", 10, "early", (), max_lr=3e-4)
    assert "note: A is a fork of B: up to step 20 they are the same run" in losscurve("compare h f")[1]
    out = losscurve("compare h g")[1]
    assert "note: A and B are forks of one run: up to step 10 they are the same run" in out
    assert "note: B is a fork of a fork of A: up to step 10" in losscurve("compare a1 h")[1]
    out = losscurve("compare a1 early")[1]
    assert "note: no loss after step 10 in both yet" in out
    assert "at step" not in out.replace("at step 10", "")


def test_forks_beside_runs_with_other_seeds_share_nothing(two_settings, losscurve):
    """Seeds 1 and 2 against forks of seeds 2 and 4: no pairs, so all of each curve counts."""
    make("a4", (5.0, 4.0, 3.1), seed=4)
    for seed in (2, 4):
        fork_of(f"a{seed}", 10, f"f{seed}", (), max_lr=3e-4)
    out = losscurve("compare a1 a2 f2 f4")[1]
    assert "without pairs" in out
    assert "the same run" not in out
    assert "at step 10: " in out


def test_a_fork_repeats_a_run_only_if_nothing_ever_changed(two_settings, losscurve):
    """A fork whose rate was 0.0003 and is 0.001 is no repetition of a run with 0.001 from its start."""
    fork_of("b1", 10, "same", (2.9,))
    assert "same: left out, as it repeats b1 with the same seed" in losscurve("compare b1 same")[2]
    make("c1", (5.0, 4.1, 2.9), seed=1, max_lr=5e-4)
    changed = fork_of("c1", 10, "changed", (2.8,), max_lr=5e-4)
    assert read_run(changed).config.max_lr == 1e-3
    code, out, err = losscurve("compare b1 changed b2")
    assert (code, "left out" in err) == (0, False)
    assert "B: changed (seed 1; forked from c1 at step 10): the same settings, another past" in out
    facts = json.loads((changed / "env.json").read_text())
    del facts["forked_from"]["before"]  # as older versions wrote it
    (changed / "env.json").write_text(json.dumps(facts))
    assert "another past" in losscurve("compare b1 changed")[1]


def test_settings_that_are_not_given_are_named_by_their_value(here, losscurve):
    make("a", (5.0, 4.0))
    make("b", (5.0, 4.0), warmup_steps=3, schedule="wsd", decay_fraction=0.2, min_lr=1e-4)
    out = losscurve("compare a b")[1]
    for words in ("warmup_steps 3 instead of 0", "min_lr 0.0001 instead of 3e-05", "fraction 0.2 instead of none"):
        assert words in out


def test_a_short_run_is_seen_whole_beside_a_long_one(here):
    """The whole of its later part is above all later losses of the long one."""
    make("long", (5.0, 3.9, 3.6, 3.4, *([3.0] * 40)))
    make("short", (5.0, 4.8, 4.4, 4.2), max_lr=1e-3)
    upper, lower = draw_comparisons(*compare([Path("long"), Path("short")])[:2]).axes
    assert upper.get_ylim()[1] > 4.8
    assert lower.get_ylim()[1] > 0.9  # at step 10
    assert upper.get_ylim()[0] < 3.0


def test_a_setting_with_one_evaluation_is_a_point(here):
    make("long", (5.0, 4.0, 3.5))
    make("short", (4.9,), max_lr=1e-3)
    make("again", (4.8,), seed=2, max_lr=1e-3)
    upper = draw_comparisons(*compare([Path("long"), Path("short"), Path("again")])[:2]).axes[0]
    points = [line for line in upper.lines if list(line.get_ydata()) in ([4.9], [4.8])]
    assert [line.get_marker() for line in points] == ["s", "s"]


def test_runs_that_do_not_compare_say_why(two_settings, losscurve):
    other = {"train.bin": "x", "val.bin": "y"}
    make("elsewhere", (5.0, 4.0, 3.0), data=other)
    make("wider", (5.0, 4.0, 3.0), block_size=128)
    make("less", (5.0, 4.0, 3.0), eval_tokens=1000)
    make("unknown", (5.0, 4.0, 3.0), data={})
    _, out, err = losscurve("compare a1 elsewhere wider less unknown")
    assert err == ""
    assert out.count("not comparable") == 4
    assert "whether of the same text is unknown" in out
    assert "another evaluation (block_size 64 and 128, eval_tokens 1,048,576 and 1,048,576)" in out
    assert "another evaluation (block_size 64 and 64, eval_tokens 1,048,576 and 1,000)" in out
    assert "no env.json says which validation text a run has" in out
    assert not Path("comparison.png").exists()


def test_other_tokens_of_the_same_text_compare_in_bits_per_byte(here, losscurve):
    (here / "other.txt").write_text((here / "text.txt").read_text()[::-1])
    for name, text, tokenizer in (("char", "text", "char"), ("byte", "text", "byte"), ("other", "other", "char")):
        assert losscurve(f"prepare {text}.txt --data_dir d-{name} --tokenizer {tokenizer}")[0] == 0
        splits = json.loads(Path(f"d-{name}/meta.json").read_text())["splits"]
        hashes = {f"{split}.bin": facts["sha256"] for split, facts in splits.items()}
        make(
            name,
            (5.0, 4.0, 3.0 + 0.1 * len(name)),
            data=hashes,
            data_dir=f"d-{name}",
            tokenizer=tokenizer,
            seed=len(name),
        )
    make("longer", (5.0, 4.0, 3.0), data=hashes, data_dir="d-other", block_size=128)
    char, _, other, longer = (read_run(Path(name)) for name in ("char", "byte", "other", "longer"))
    assert char.text.tokens == len(Path("d-char/val.bin").read_bytes()) // 2
    code, out, _ = losscurve("compare char byte other")
    assert code == 0
    assert "at step 20: not known: 0.000 bits per byte higher" in out  # 3.4 nats per token of both, over 2
    assert "other tokens of the same text: only bits per byte compare" in out
    assert "another text: losses on different texts do not compare" in out
    spaced = dataclasses.replace(read_run(Path("other")), path=Path("my run"))
    assert common_unit(read_run(Path("char")), spaced)[1][0].endswith("evaluate char 'my run' --text FILE")
    assert common_unit(other, longer)[0] == "loss"  # both evaluate the whole text
    assert "up to 64 tokens before it in one, 128 in the other" in common_unit(other, longer)[1][0]
    Path("d-byte").rename("moved")
    assert "whether of the same text is unknown" in common_unit(char, read_run(Path("byte")))[1][0]
    assert common_unit(char, read_run(Path("byte"), "moved"))[0] == "bits_per_byte"


def test_equal_tokens_are_found_between_evaluations(here):
    """12 windows a step and 8: at 240 x 64 tokens one is at step 20, the other between its evaluations 20 and 40."""
    make("few", (5.0, 4.0, 3.5, 3.25, 3.0), batch_size=8)
    make("many", (5.0, 4.2, 3.6), batch_size=12)
    _, (found,), _ = compare([Path("few"), Path("many")])
    assert found.findings["tokens"].where == f"{240 * 64:,} tokens"
    assert found.findings["tokens"].difference.mean == pytest.approx(3.6 - 3.25)
    assert found.findings["step"].difference.mean == pytest.approx(3.6 - 3.5)


def test_runs_that_still_train_are_compared_as_far_as_they_are(two_settings, losscurve):
    with Path("b1/metrics.jsonl").open("a") as record:
        record.write('{"step": 30, "split": "val", "lo')
    make("new", (5.0,), max_lr=1e-2)
    make("started", (), max_lr=2e-2)
    make("burst", (5.0, 4.5, None, None), max_lr=1.0)
    code, out, _ = losscurve("compare a1 b1 new burst started")
    assert code == 0
    assert "at step 20: not known: 0.100 nats per token lower" in out
    assert out.count("note: no loss after step 0 in both yet") == 2
    assert "burst: its validation loss is not finite at step 20" in out
    assert "at step 10: not known: 0.50 nats per token higher" in out.replace("0.500", "0.50")


def test_a_run_given_twice_counts_once_and_a_repeat_is_left_out(two_settings, losscurve):
    shutil.copytree("a1", "copy")
    code, out, err = losscurve("compare a1 a1 copy a2")
    assert code == 0
    assert "copy: left out, as it repeats a1 with the same seed; their validation losses differ by 0 at most" in err
    assert out.splitlines() == [
        "A: a1, a2 (seeds 1, 2)",
        "A: validation loss 3.1000 at step 20, 3.0000 to 3.2000 by seed; one setting only, so there is nothing to "
        "compare it with",
    ]


@pytest.mark.pictures
def test_damage_is_one_line(two_settings, losscurve):
    assert losscurve("compare a1 nowhere")[2].startswith("error: nowhere: no run here")
    Path("empty").mkdir()
    assert losscurve("compare a1 empty")[2].startswith("error: empty: no run here")
    Path("b1/metrics.jsonl").write_text("{\n{}\n")
    code, _, err = losscurve("compare a1 b1")
    assert (code, err.count("\n")) == (2, 1)
    assert "b1/metrics.jsonl: line 1 is damaged" in err
    Path("b2/env.json").write_text("[")
    assert "no env.json says" in losscurve("compare a1 b2")[1]
    assert losscurve("compare a1 a2 b3 --out picture.xyz")[2].startswith("error: picture.xyz: unknown picture format")


def test_the_average_of_the_weights_counts_where_it_is_lower(here):
    run = make("ema", (5.0,), ema=0.99)
    append(run, step=10, split="val", loss=4.0, bits_per_byte=2.0, val_loss_ema=3.0, tokens=1, seconds=1.0)
    assert read_run(run).points("step", "loss") == [(0, 5.0), (10, 3.0)]
    assert read_run(run).points("step", "bits_per_byte") == [(0, 2.5), (10, 1.5)]


def test_the_parts_of_a_text_are_all_of_it(here):
    """The mean of the parts, each weighted by its tokens, is the validation loss that the run recorded at its end."""
    paths = []
    for seed in (1, 2):
        run, _ = trained(config_for(here, out_dir=str(here / f"run{seed}"), seed=seed))
        paths.append(run.out_dir)
        parts = part_evaluations(read_run(run.out_dir))
        (_, recorded) = losses(read_record(run.out_dir), "val")[-1]
        tokens = [part.tokens for part in parts]
        assert sum(tokens) == len(run.parts.data.val) - 1
        assert np.average([part.loss for part in parts], weights=tokens) == pytest.approx(recorded, abs=1e-6)
        assert len(parts) == min(PARTS, sum(tokens) // 16 // 2)
    config = dataclasses.replace(read_run(paths[1]).config, max_lr=2e-2)
    (paths[1] / "config.toml").write_text(write_toml(config))
    _, (found,), _ = compare(paths)
    assert found.findings["weights"].pair == "part"
    assert f"{sum(tokens):,} validation tokens" in found.findings["weights"].where
    assert not found.findings["step"].difference.is_real


def test_the_picture_shows_the_curves_and_the_differences(two_settings):
    runs = [Path(name) for name in ("a1", "a2", "a3", "b1", "b2", "b3")]
    settings, comparisons, _ = compare(runs)
    upper, lower = draw_comparisons(settings, comparisons).axes
    assert sorted(tuple(line.get_ydata()) for line in upper.lines if len(line.get_ydata()) == 3) == sorted(
        tuple(loss for _, loss in losses(read_record(run), "val")) for run in runs
    )
    curve = difference_curve(*settings, "step", "loss")
    drawn = [line for line in lower.lines if len(line.get_ydata()) == 3]
    assert [list(line.get_ydata()) for line in drawn] == [[found.mean for _, found in curve]]
    assert [place for place, _ in curve] == [0, 10, 20]
    assert [found.mean for _, found in curve] == pytest.approx([0, 0.1, -0.11])
    (band,) = lower.collections
    edges = band.get_paths()[0].vertices[:, 1]
    assert {min(edges), max(edges)} <= {value for _, found in curve for value in (found.low, found.high)}
    assert lower.get_title(loc="left").startswith("difference (below 0: better); band: 95 % interval")


def test_units_do_not_depend_on_the_order(two_settings):
    make("wider", (5.0, 4.0, 3.0), block_size=128)
    for pair in (("a1", "b1"), ("a1", "wider")):
        first, second = (read_run(Path(name)) for name in pair)
        assert common_unit(first, second)[0] == common_unit(second, first)[0]
    with pytest.raises(UserError, match="26"):
        compare([make(f"many{i}", (5.0, 4.0), max_lr=1e-3 + 1e-5 * i) for i in range(27)])


def test_the_page_says_what_the_command_says(two_settings, losscurve):
    starlette = pytest.importorskip("starlette.testclient", exc_type=ImportError)
    server = pytest.importorskip("llm.page.server")
    runs = [Path(name) for name in ("a1", "a2", "a3", "b1", "b2", "b3")]
    page = starlette.TestClient(server.Server(runs, "token", 8123).config.app, base_url="http://127.0.0.1:8123/token")
    answer = page.get("/comparison").json()
    assert f"{answer['words']}\nwrote comparison.png\n" == losscurve("compare a1 a2 a3 b1 b2 b3")[1]
    assert base64.b64decode(answer["picture"].removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    (two_settings / "model.gguf").touch()
    (two_settings / "new").mkdir()
    assert comparison_of([Path("new"), *runs, Path("no"), Path("model.gguf")]) == answer
    assert comparison_of([Path("no")]) == {"words": "no run has a record yet", "picture": ""}
    Path("b3/config.toml").unlink()
    assert comparison_of(runs)["words"] == "b3: no run here (no config.toml); give the folder of a training run"
