"""The report: a file that needs nothing else, says what the run's files say, and takes every text for text."""

import base64
import hashlib
import json
import math
import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import append, flags, write_samples

from llm.config import coerce, from_settings, write_toml
from llm.errors import UserError
from llm.record import bands
from llm.record.bands import Band
from llm.record.metrics import read_record
from llm.report import card
from llm.report import gather as gathering
from llm.report.card import count
from llm.report.chart import Chart, Curve, ticks
from llm.report.gather import gather
from llm.report.write_html import page, write_html
from llm.report.write_markdown import write_markdown

VOID = {"meta", "link", "input", "br"}
HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)> & \"'`| [a](http://b) {{ 7 * 7 }} \x1b[31m\x00\x85\u202e"
)


class Page(HTMLParser):
    """A page, read by the standard library: its elements, its text, and that every element is closed in its turn."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.words, self.inside = [], [], [], {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), (tag, names)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert {"svg", "figure"} & set(self.open), f"<{tag}/> closes nothing in HTML"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open[-1] == tag, (self.open, tag)
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.inside.setdefault(self.open[-1], []).append(data)
        else:
            self.words.append(data)

    @property
    def text(self):
        return "".join(self.words)

    def tags(self):
        return {tag for tag, _ in self.elements}

    def with_class(self, tag, name):
        return [attrs for found, attrs in self.elements if found == tag and name in attrs.get("class", "").split()]


def make_run(folder, steps=2000, samples=True, words="Speak, lord", **settings):
    """A run that overfits from 1,000 on, as its files would be; trained on nothing."""
    folder.mkdir(parents=True)
    config = from_settings({"vocab_size": 50257, "max_steps": 2000, "sample_prompt": "ROMEO:"} | settings)
    (folder / "config.toml").write_text(write_toml(config), encoding="utf-8")
    written = []
    for step in range(0, steps + 1, 25):
        fall = 6.0 * math.exp(-step / 150)
        facts = {"lr": 3e-4, "tokens": step * 2048, "seconds": step / 2.5}
        more = {"grad_norm": 1.0, "tokens_per_second": 5000.0, "matmul_utilisation": 0.5} if step else {}
        append(folder, step=step, split="train", loss=4.4 - step / 1500 + fall, **facts, **more)
        if step % 250 == 0:
            val = 4.78 + fall + max(0, step - 1000) / 4000
            append(folder, step=step, split="val", loss=val, bits_per_byte=val / 2, **facts)
            written.append((step, val, f"\n{words} {step}"))
    if samples:
        write_samples(folder, *written, prompt="ROMEO:")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of characters, trained for a few steps, and its text."""
    from conftest import words

    from llm.commands.main import main

    folder = tmp_path_factory.mktemp("report")
    (folder / "text.txt").write_text(words(900), encoding="utf-8")
    line = f"train --text {folder}/text.txt --data_dir {folder}/data --out_dir {folder}/run {flags()}"
    assert main(line.split()) == 0
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    """The trained run, to be spoilt."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def read(run, **how):
    return Page(page(gather(run, **how)))


def test_the_page_is_whole_and_asks_for_nothing(trained):
    html = page(gather(trained))
    shown = Page(html)
    assert html.startswith("<!DOCTYPE html>\n<!-- losscurve report -->\n<html lang=")
    assert {"title", "h1", "main", "nav", "figure", "svg", "polyline", "pre", "table"} <= shown.tags()
    named = [attrs["id"] for _, attrs in shown.elements if "id" in attrs]
    assert len(set(named)) == len(named)
    for tag, attrs in shown.elements:
        assert not [name for name in attrs if name.startswith("on") or name in ("style", "src", "srcset", "action")], (
            tag
        )
        href = attrs.get("href", "#curves")
        assert href == "data:," or href[1:] in named, href
        for label in ("for", "aria-labelledby"):
            assert attrs.get(label, named[0]) in named
    (policy,) = (
        attrs["content"] for _, attrs in shown.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert set(rules) == {"default-src", "style-src", "script-src", "img-src", "base-uri", "form-action"}
    numbers, script = shown.inside["script"]
    for kind, content in (("script", script), ("style", shown.inside["style"][0])):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"  # of what stands in the file
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert json.loads(numbers)["loss"]["validation"][0] == [0, 4, 8, 12]
    for script_or_style in (script, shown.inside["style"][0]):
        assert not re.search(r"@import|url\(|fetch|XMLHttp|WebSocket|import\(|eval|innerHTML", script_or_style)


def test_the_numbers_are_those_of_the_run(trained):
    shown, rows = read(trained), read_record(trained)
    val = [(row["step"], row["loss"]) for row in rows if row["split"] == "val"]
    step, low = min(val, key=lambda point: point[1])
    assert f"Validation loss{low:.4f}nats per token at best, step {step}" in shown.text
    assert "all 12 steps" in shown.text
    assert "Tokens trained on768" in shown.text
    text = (trained.parent / "text.txt").read_text(encoding="utf-8")
    train = text[: round(len(text) * 0.9)]
    (most, times), *_ = Counter(train).most_common()
    assert re.search(rf"␣\s*{sorted(set(text)).index(most)}\s*{times:,}\s*{100 * times / len(train):.2f} %", shown.text)
    assert f"training tokens{len(train):,}" in shown.text.replace("\n", "")
    samples = (trained / "samples.txt").read_text(encoding="utf-8")
    for written in re.findall(r"--- step \d+ \| val [\d.]+ ---\n(.{3,6}?)\n\n", samples, re.S):
        assert written in shown.text


def test_the_curve_is_drawn_where_the_losses_are(tmp_path):
    run = make_run(tmp_path / "run")
    shown = read(run)
    (figure,) = (attrs for tag, attrs in shown.elements if tag == "figure" and "loss" in attrs["class"].split())
    low, high, end = (float(figure[f"data-{name}"]) for name in ("low", "high", "end"))
    for split, name in (("val", "validation"), ("train", "training")):
        (line,) = (attrs for attrs in shown.with_class("polyline", name))
        points = [tuple(map(float, point.split(","))) for point in line["points"].split()]
        drawn = [(x / 1000 * 1.02 * end - 0.01 * end, high - y / 1000 * (high - low)) for x, y in points]
        expected = [(r["step"], r["loss"]) for r in read_record(run) if r["split"] == split]
        assert np.abs(np.array(drawn) - expected).max(0) == pytest.approx([0, 0], abs=0.02)
    assert low < math.log(50257) / 4
    assert high > 10.8
    assert "overfits since step 1,000" in shown.text
    assert "best 4.79" in shown.text
    assert len(shown.with_class("rect", "shade")) == 2  # the curve and its key
    assert not shown.with_class("polygon", "band")


def test_labels_keep_apart():
    curves = (Curve("a", "a", [(0, 4.0), (100, 2.0)]), Curve("b", "b", [(0, 4.0), (100, 1.99)]))
    chart = Chart("loss", "", "", 100, 1.0, 4.0, curves, levels=[(2.1, "level")], star=(100, 1.95, "best"))
    (upper, first), (lower, second) = chart.end_labels()
    assert (first.name, second.name) == ("a", "b")
    assert lower - upper >= 5
    assert (chart.level_side(2.1), chart.level_side(1.5)) == ("above", "below")
    assert chart.star_side() == "under"
    assert replace(chart, star=(100, 1.5, "best")).star_side() == "over"
    assert replace(chart, star=(20, 1.95, "best")).star_side() == "over"


def test_the_band_is_drawn_where_there_is_one(tmp_path, monkeypatch):
    band = Band("chapter", 5, (0, 1000, 2000, 3000), (10.8, 4.8, 5.0, 5.2), (0.1, 0.1, 0.2, 0.3))
    monkeypatch.setattr(gathering, "band_of_run", lambda run_dir: band)
    shown = read(make_run(tmp_path / "run"))
    (polygon,) = shown.with_class("polygon", "band")
    assert len(polygon["points"].split()) == 6  # up to where the run is
    assert "reference band: 95 % of chapter runs (5 seeds)" in shown.text
    assert "inside the reference band: validation loss 5.030 at step 2000" in shown.text
    monkeypatch.setattr(gathering, "band_of_run", bands.band_of_run)
    assert "the reference band:" not in read(tmp_path / "run").text


def test_what_stands_in_the_training_text_is_counted_as_by_hand(trained):
    memorisation = gather(trained).memorisation
    text = (trained.parent / "text.txt").read_text(encoding="utf-8")
    cut = round(len(text) * 0.9)
    train, val = text[:cut], text[cut:]
    assert [row.source for row in memorisation.overlaps] == [
        "temperature 0.5",
        "temperature 0.8",
        "temperature 1",
        "validation text",
    ]
    assert memorisation.weights == "best.pt"
    assert memorisation.tokens == 2016  # 63 samples of 32, the least that the context of 16 is stretched to
    count = min(63, len(val) // 32)
    windows = [val[i * (len(val) // 32) // count * 32 :][:32] for i in range(count)]
    grams = [window[i : i + 8] for window in windows for i in range(25)]
    assert memorisation.overlaps[-1].share == pytest.approx(np.mean([gram in train for gram in grams]))
    longest = max((w[i:j] for w in windows for i in range(32) for j in range(i + 1, 33) if w[i:j] in train), key=len)
    assert memorisation.overlaps[-1].longest == len(longest)
    shown = read(trained)
    assert f"{100 * memorisation.overlaps[-1].share:.1f} %" in shown.text
    assert gather(trained, memorised=False).memorisation is None
    assert "Memorised" not in read(trained, memorised=False).text


def test_every_text_stays_text(tmp_path):
    harmless = make_run(tmp_path / "harmless", text=("my.txt",))
    (harmless / "env.json").write_text('{"torch": "2.13"}')
    clean = read(harmless)
    settings = {"text": (HOSTILE,), "init_from": "</style>" + HOSTILE, "sample_prompt": HOSTILE.replace("\x00", "")}
    nasty = make_run(
        tmp_path / "<b onclick=x>\x1bname", words=HOSTILE + "</pre></script>\n````\n" + HOSTILE, **settings
    )
    env = {"torch<i>": HOSTILE, "commit": HOSTILE * 100, "data": {HOSTILE: HOSTILE}}
    (nasty / "env.json").write_text(json.dumps(env), encoding="utf-8")
    html = page(gather(nasty, memorised=False))
    shown = Page(html)
    assert not shown.tags() - clean.tags()
    assert len(shown.inside["script"]) == 2
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", html)
    assert (
        "<script>alert(1)</script><img src=x onerror=alert(2)> & \"'`| [a](http://b) {{ 7 * 7 }} ␛[31m␀" in shown.text
    )
    assert "<b onclick=x>\ufffdname" in shown.text
    assert "torch<i>" in shown.text

    out = tmp_path / "card.md"
    write_markdown(gather(nasty, memorised=False), out)
    markdown_it = pytest.importorskip("markdown_it")
    rendered = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(out.read_text("utf-8"))
    ours = {"details", "summary", "h1", "h2", "p", "img", "table", "thead", "tbody", "tr", "th", "td"}
    shown = Page(rendered.replace(" />", ">").replace("<img ", "<meta "))
    assert shown.tags() <= ours | {"pre", "code", "ul", "li", "meta"}
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in shown.text
    assert all(set(attrs) <= {"class", "src", "alt"} for _, attrs in shown.elements)


def test_a_report_has_no_folder_of_the_machine(tmp_path):
    secret = {"data_dir": "/home/alice/secret/data", "out_dir": "/home/alice/runs/mine", "text": ["/home/alice/my.txt"]}
    run = make_run(tmp_path / "mine", **secret)
    append(run, step=2025, split="train", loss=9.0, spikes=[2020])
    (run / "samples.jsonl").unlink()
    report = gather(run)
    write_markdown(report, tmp_path / "card.md")
    for written in (page(report), (tmp_path / "card.md").read_text(encoding="utf-8")):
        assert "alice" not in written
        assert str(tmp_path) not in written
        assert "my.txt" in written
        assert "token files are not there" in written


def test_a_long_run_stays_small(tmp_path):
    run = make_run(tmp_path / "run", samples=False, max_steps=10**6)
    rows, samples = [], []
    for step in range(2001, 32001):
        rows.append(
            json.dumps({"step": step, "split": "train", "loss": 3 + step % 7 / 9, "lr": 1e-4, "grad_norm": 0.123456789})
        )
        if step % 100 == 0:
            rows.append(json.dumps({"step": step, "split": "val", "loss": 4.5}))
            samples.append((step, 4.5, "<&" * 5000))
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n".join(rows) + "\n")
    write_samples(run, *samples)
    made = gather(run)
    html = page(made)
    assert len(html.encode()) < 2**20  # 6 MB are allowed
    assert len(made.samples) == gathering.SAMPLES
    assert len(made.evaluations) <= gathering.EVALUATIONS + 1
    shown = Page(html)
    assert f"{gathering.SAMPLES} of 300 samples" in shown.text
    assert "… 6,000 more characters" in shown.text
    assert "32,000 of 1,000,000 steps so far" in shown.text


def test_parts_that_are_missing_say_so(run, losscurve, monkeypatch):
    monkeypatch.chdir(run.parent)
    (run / "best.pt").unlink()
    assert gather(run).memorisation.weights == "model.pt"
    (run / "model.pt").unlink()
    assert "no weights are saved yet" in read(run).text
    (run / "env.json").unlink()
    (run / "samples.jsonl").unlink()
    shown = read(run)
    assert "no env.json that can be read" in shown.text
    assert "no sample was written" in shown.text
    (run / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: not a tokenizer that losscurve wrote" in read(run).text
    assert str(run) not in page(gather(run))
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(re.sub(r'data_dir = ".*"', 'data_dir = "gone"', config))
    code, out, err = losscurve("report run")
    assert (code, out) == (0, f"wrote {Path('run/report.html')} (0.03 MiB)\n")
    assert err.startswith("warning: gone: the run's token files are not there")
    assert "Most frequent" not in (run / "report.html").read_text(encoding="utf-8")
    code, out, err = losscurve("report run --data_dir nowhere")
    assert (code, out) == (2, "")
    assert err == "error: nowhere: the run's token files are not there (seen from here); say where by --data_dir\n"


def test_a_run_of_no_step_and_one_under_way(run):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(re.sub(r'out_dir = ".*"', 'out_dir = "."', config))  # trained inside its folder
    for kept in (0, 1, 2, 3, 6):
        (run / "metrics.jsonl").write_text("".join(lines[:kept]))
        shown = read(run, memorised=False)
        assert "of 12 steps so far" in shown.text
        assert ("polyline" in shown.tags()) == (kept > 0)
    assert "No step is recorded yet" not in shown.text
    (run / "metrics.jsonl").write_text("".join(lines[:6]) + '{"step": 99, "spl')  # being written
    assert "6 of 12 steps so far" in read(run, memorised=False).text
    (run / "metrics.jsonl").write_text('{"step": 0, "split": "train", "loss": NaN}\n')
    assert "No step is recorded yet" in read(run, memorised=False).text


def test_token_files_of_another_program(here, losscurve):
    Path("data").mkdir()
    np.resize(np.arange(300), 600).astype("<u2").tofile("data/train.bin")
    np.full(50, 299, dtype="<u2").tofile("data/val.bin")
    small = flags(max_steps=2, eval_every=2, vocab_size=300, warmup_steps=0).replace("--tokenizer char", "")
    assert losscurve(f"train --data_dir data {small}")[0] == 0
    code, out, err = losscurve("report")
    assert (code, out.split(" (")[0]) == (0, f"wrote {Path('checkpoints/report.html')}")
    assert err == "warning: the run has no tokenizer.json, so tokens are shown as ids\n"
    text = Page(Path("checkpoints/report.html").read_text(encoding="utf-8")).text
    assert "a text of unknown origin" in text
    assert "300 of 300" in text
    assert "no sample was written" in text
    assert re.search(r"validation text\s*0\.0 %\s*1\s*299", text)


def test_counting_in_pieces_and_of_a_part(monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 9, 1000).astype("<u2")
    monkeypatch.setattr(card, "PIECE", 64)
    counts, counted = count(tokens, 12)
    assert counts.tolist() == [Counter(tokens.tolist())[i] for i in range(12)]
    assert counted == 1000
    monkeypatch.setattr(card, "COUNTED", 256)
    counts, counted = count(tokens, 12)
    assert counts.sum() == counted
    assert 192 <= counted <= 320


def test_only_an_earlier_report_is_overwritten(run, tmp_path, losscurve, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = gather(run, memorised=False)
    write_html(made, tmp_path / "new" / "a.html")
    before = (tmp_path / "new" / "a.html").read_bytes()
    assert losscurve("report run --no_memorised --out new/b.html")[0] == 0
    write_html(gather(run), tmp_path / "new" / "a.html")
    assert (tmp_path / "new" / "a.html").read_bytes() != before
    for out in ("run/config.toml", "run/model.pt", "run", "run/metrics.jsonl"):
        content = Path(out).read_bytes() if Path(out).is_file() else None
        code, _, err = losscurve(f"report run --no_memorised --out {out}")
        assert (code, len(err.splitlines())) == (2, 1)
        assert out in err
        assert "--out" in err
        assert content is None or Path(out).read_bytes() == content
    Path("empty.html").touch()
    with pytest.raises(UserError, match="is not a report"):
        write_html(made, Path("empty.html"))
    with pytest.raises(UserError, match="cannot be written"):
        write_html(made, Path("empty.html/report.html"))
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.pictures
def test_markdown_with_pictures(run, tmp_path, losscurve, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        code, out, _ = losscurve("report run --format md")
        assert (code, out.split(" (")[0]) == (0, f"wrote {Path('run/report/report.md')}")
    folder = Path("run/report")
    assert {path.name for path in folder.iterdir()} == {"report.md", "report-loss_curve.png", "report-schedule.png"}
    text = (folder / "report.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(<(.*?)>\)", text):
        assert (folder / target).read_bytes().startswith(b"\x89PNG")
    for words in (
        "# run",
        "| steps | 12 of 12 |",
        "8-grams",
        "## Samples over time",
        "losscurve train --text text.txt",
    ):
        assert words in text, words
    (folder / "report.md").unlink()
    code, _, err = losscurve("report run --format md --no_memorised")
    assert (code, err.split("; ")[0]) == (
        2,
        f"error: {folder / 'report-loss_curve.png'}: exists and is not of an earlier report",
    )
    Path("README.md").write_text("# Mine")
    assert losscurve("report run --format md --no_memorised --out README.md")[0] == 2
    assert Path("README.md").read_text() == "# Mine"


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("nowhere", "nowhere: no run here"),
        ("run --format pdf", "invalid choice: 'pdf'"),
        ("run --no_memorized", "did you mean --no_memorised?"),
    ],
)
def test_a_mistake_is_one_clear_line(run, tmp_path, losscurve, monkeypatch, mistake, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = losscurve(f"report {mistake}")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert words in err


def test_the_command_repeats_the_run(run):
    made = gather(run, memorised=False)
    words = made.command().split()[2:]
    from llm.commands.flags import Parser, add_settings, config_from
    from llm.config import FIELDS

    parser = Parser("x", "")
    add_settings(parser, FIELDS)
    again = config_from(parser.read(words))
    for name in ("batch_size", "max_steps", "warmup", "final_lr", "max_lr", "tokenizer", "eval_every", "log_every"):
        assert getattr(again, name) == getattr(made.config, name), name
    assert made.config.model.n_embd == again.model.n_embd == 16

    odd = replace(made, config=replace(made.config, save_every=600.0))
    assert "--save_every 600s" in odd.command()  # 600.0 would be 600 steps
    assert coerce("save_every", "600s") == 600.0


def test_the_tokens_are_those_of_the_record(tmp_path):
    """As of a fork, whose steps had 2,048 tokens before it and have 4,096 since then."""
    folder = make_run(tmp_path / "run", steps=1000, batch_size=64)
    assert gather(folder, memorised=False).tokens == 1000 * 2048


def test_the_command_repeats_a_run_of_a_llama_and_its_bpe(run):
    made = gather(run, memorised=False)
    llama = {"arch": "llama", "optimizer": "muon", "muon_lr": 0.03, "tokenizer": "bpe", "vocab_size": 512}
    config = from_settings(llama | {"max_steps": 12, "warmup_steps": 0})
    flags_given = replace(made, config=config).command().split("--")[1:]
    assert sorted(flag.split()[0] for flag in flags_given) == sorted([*llama, "max_steps"])  # no default is repeated
    assert "vocab_size" not in replace(made, config=from_settings({"tokenizer": "gpt2"})).command()


def test_the_loss_of_an_average_says_so(tmp_path, losscurve):
    folder = make_run(tmp_path / "run", steps=250, ema=0.9, optimizer="muon", muon_lr=0.015)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for number in range(70):  # so many that the table leaves some out, but not the best
        loss = {"loss": 9.0 - number / 100, "bits_per_byte": 3.0, "val_loss_ema": 2.0 if number == 3 else 9.5}
        lines.append({"split": "val", "step": 251 + number, **loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = read(folder, memorised=False)
    assert "2.0000nats per token at best, step 254, by the average of the weights" in shown.text
    assert "loss of the average" in shown.text
    assert re.search(r"training\s*average of the weights", shown.text)  # the key of the curves
    assert re.search(r"254\s*best\D*8\.9700\s*3\.000\s*2\.0000", shown.text)
    assert "Learning rate of AdamW; Muon's is 50 times that" in shown.text
    assert losscurve(f"report {folder} --format md --no_memorised")[0] == 0
    written = (folder / "report" / "report.md").read_text()
    assert "2.0000 nats per token, at step 254, by the average of the weights" in written


def test_the_command_keeps_a_name_that_begins_with_a_dash(run):
    made = gather(run, memorised=False)
    odd = replace(made, config=replace(made.config, text=("a b.txt", "-x.txt")))
    assert "'--text=a b.txt' --text=-x.txt" in odd.command()


@pytest.mark.parametrize(("low", "high"), [(0, 5000), (2.3, 11.2), (0, 3e-4), (-1, 1), (0, 1), (5, 5), (1e-9, 2e-9)])
def test_ticks_are_round_few_and_inside(low, high):
    found = ticks(low, high, 5)
    assert 1 <= len(found) <= 7
    assert all(low <= tick <= high * (1 + 1e-9) for tick in found)
    assert all(tick == pytest.approx(float(f"{tick:.3g}"), rel=1e-12) for tick in found)


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    driver = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium or google-chrome here")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    with driver.sync_playwright() as started:
        opened = started.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-quic", *quiet]
        )
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, tmp_path):
    """`opened(run, **context)`: its report in the browser; fails if it asks for anything or complains."""
    wrong, contexts = [], []

    def show(run, **how):
        write_html(gather(run), tmp_path / "report.html")
        context = browser.new_context(**how)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(10_000)
        tab.on("request", lambda request: wrong.append(request.url) if "report.html" not in request.url else None)
        tab.on("console", lambda message: wrong.append(message.text))  # the policy's complaints too
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto((tmp_path / "report.html").as_uri())
        return tab

    yield show
    for context in contexts:
        context.close()
    assert wrong == []


def test_the_keyboard_reads_and_zooms(opened, tmp_path):
    run = make_run(tmp_path / "run")
    tab = opened(run)
    losses = {(r["split"], r["step"]): r["loss"] for r in read_record(run)}

    def said():
        return tab.locator(".loss output").inner_text()

    assert said() == f"validation {losses['val', 2000]:.4f}, training {losses['train', 2000]:.4f}"
    tab.locator("#step").focus()
    for _ in range(2):
        tab.keyboard.press("ArrowLeft")
    assert tab.locator("#place").inner_text() == "1,950"
    assert said() == f"validation {losses['val', 2000]:.4f} (step 2,000), training {losses['train', 1950]:.4f}"
    assert "step 1950" in tab.locator("#step").get_attribute("aria-valuetext")
    before = tab.locator(".loss polyline.validation").get_attribute("points")
    tab.locator("#in").focus()
    for _ in range(2):
        tab.keyboard.press("Enter")
    labels = [float(words.replace(",", "")) for words in tab.locator(".loss .tick.x text").all_text_contents()]
    assert all(1400 < step <= 2000 for step in labels)
    assert 2 <= len(labels) <= 7
    assert not tab.locator(".loss .star").is_visible()
    tab.locator("#whole").click()
    assert tab.locator(".loss .star").is_visible()
    assert tab.locator(".loss .curves").get_attribute("viewBox") == "0 0 1000 1000"
    assert tab.locator(".loss polyline.validation").get_attribute("points") == before


def test_dragging_zooms_to_what_was_chosen(opened, tmp_path):
    tab = opened(make_run(tmp_path / "run"))
    tab.locator(".loss .frame").scroll_into_view_if_needed()
    box = tab.locator(".loss .frame").bounding_box()

    def place(step):
        return box["x"] + box["width"] * (step + 20) / 2040, box["y"] + 50

    tab.mouse.move(*place(500))
    assert tab.locator("#place").inner_text() == "500"
    tab.mouse.down()
    tab.mouse.move(*place(800))
    tab.mouse.move(*place(1000))
    tab.mouse.up()
    left, _, width, _ = map(float, tab.locator(".loss .curves").get_attribute("viewBox").split())
    assert [left, width] == pytest.approx([1000 * 520 / 2040, 1000 * 500 / 2040], abs=2)
    levels = [float(words) for words in tab.locator(".loss .tick.y text").all_text_contents()]
    assert all(3.5 < level < 5.5 for level in levels)  # what is there between the two, not the fall before
    tab.mouse.dblclick(*place(700))
    assert tab.locator("#whole").is_disabled()


def test_it_is_read_without_scripts_on_a_phone_in_the_dark_and_on_paper(opened, trained, tmp_path):
    plain = opened(trained, java_script_enabled=False, viewport={"width": 360, "height": 700}, color_scheme="dark")
    assert plain.locator(".loss polyline.validation").is_visible()
    assert plain.locator(".loss .tick.y text").first.is_visible()
    assert not plain.locator(".controls").is_visible()
    tab = opened(trained, viewport={"width": 360, "height": 700}, color_scheme="dark")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    look = "getComputedStyle(document.querySelector('.card')).backgroundColor"
    assert tab.evaluate(look) == "rgb(30, 33, 37)"
    outside = """[...document.querySelectorAll('.frame text')].filter((text) => {
        const box = text.getBoundingClientRect();
        return getComputedStyle(text).visibility === 'visible' && (box.left < 0 || box.right > innerWidth);
    }).map((text) => text.textContent)"""
    assert tab.evaluate(outside) == []
    tab.emulate_media(media="print", color_scheme="dark")
    for part in (".card", "body"):
        assert tab.evaluate(look.replace(".card", part)) == "rgb(255, 255, 255)"
    assert tab.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.locator("details:not([open])").count() == 0
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.locator("details:not([open])").count() > 0


def test_hostile_text_runs_nothing(opened, tmp_path):
    tab = opened(make_run(tmp_path / "<img src=x onerror=document.title=1>", words=HOSTILE, text=(HOSTILE,)))
    assert tab.title().startswith("<img src=x onerror=document.title=1>")
    assert tab.locator("img").count() == 0
    assert tab.locator("script").count() == 2
