"""The live page and an exported one in a real browser: Chromium without a window, driven by Playwright."""

import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from conftest import append, flags, words, write_samples

from llm.commands.main import main
from llm.experiments.trials import Setting, Try
from llm.run import Run

for package in ("starlette", "uvicorn", "plotly"):
    pytest.importorskip(package)
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome here")
ARGUMENTS = [
    *("--no-sandbox", "--headless", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
HOSTILE = "<img src=x onerror=window.hacked=1><b>bold"
WAIT = 60_000  # milliseconds, of what takes one or two seconds on a machine that has nothing else to do


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    (folder / "text.txt").write_text(words(400), encoding="utf-8")
    line = f"train --text {folder}/text.txt --data_dir {folder}/data --out_dir {folder}/run {flags()}"
    assert main(line.split()) == 0
    return folder / "run"


@contextmanager
def opened(browser, *runs: Path, **look):
    """The page of some run folders, served by the command; fails if it asks for anything outside this machine, or
    if a script or the policy of the page has anything to complain of.
    """
    command = [sys.executable, "-m", "llm", "watch", *map(str, runs)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    asked, wrong = [], []
    try:
        address = server.stdout.readline().split(" at ")[-1].split()[0]
        context = browser.new_context(**look)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
        page.goto(address)
        page.address, page.server, page.asked, page.wrong = address, server, asked, wrong
        yield page
        context.close()
    finally:
        server.terminate()
        server.wait(10)
        server.stdout.close()
    outside = [
        url for url in asked if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).hostname != "127.0.0.1"
    ]
    assert asked
    assert outside == []
    assert wrong == []


def until(look, wanted, what=""):
    """Wait until `look()` is, or satisfies, `wanted`. Raises AssertionError with the last seen."""
    end = time.monotonic() + WAIT / 1000
    while True:
        seen = look()
        if wanted(seen) if callable(wanted) else seen == wanted:
            return seen
        assert time.monotonic() < end, f"{what}: last seen {seen!r}"
        time.sleep(0.05)


def trace(page, name):
    """The x of the loss chart's curve of that name; empty where there is none."""
    found = "(document.getElementById('loss-chart').data || []).find(trace => trace.name === name)"
    return page.evaluate(f"name => ({found} || {{x: []}}).x.map(Number)", name)


def row(step, split="train", loss=3.0):
    return {"step": step, "split": split, "loss": loss, "lr": 1e-3, "tokens": step * 64, "seconds": step * 0.5}


def fill(folder, steps):
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text("vocab_size = 100\nmax_steps = 100\n")
    for step in steps:
        append(folder, **row(step))
        if step % 5 == 0:
            append(folder, **row(step, "val", 4.0 - step / 100))


def test_the_curve_follows_a_run_through_reload_restart_and_deletion(browser, tmp_path):
    run = tmp_path / "run"
    with opened(browser, run) as page:
        page.get_by_text("waiting for a run").wait_for()
        fill(run, range(6))
        until(lambda: trace(page, "training"), [0, 1, 2, 3, 4, 5], "first rows")
        fill(run, range(6, 11))
        until(lambda: trace(page, "training"), list(range(11)), "more rows")
        until(lambda: trace(page, "validation"), [0, 5, 10], "evaluations")
        until(lambda: page.locator(".run").inner_text(), lambda text: "3.900 at 10" in text, "the best of them")
        page.reload()
        until(lambda: trace(page, "training"), list(range(11)), "after a reload")
        (run / "metrics.jsonl").unlink()
        fill(run, range(3))
        until(lambda: trace(page, "training"), [0, 1, 2], "after a restart")
        page.select_option("#axis", "tokens")
        until(lambda: trace(page, "training"), [0, 64, 128], "over tokens")
        ahead = "document.getElementById('lr-chart').data[0].x[0]"
        until(lambda: page.evaluate(ahead), 128, "the future from there on, though a step of these settings has 2,048")
        page.select_option("#axis", "time")
        until(lambda: trace(page, "training")[-1], pytest.approx(1 / 60), "over minutes")
        shutil.rmtree(run)
        page.get_by_text("waiting for a run").wait_for()
        until(lambda: trace(page, "training"), [], "after the folder was deleted")


def test_two_runs_lie_over_each_other_and_hostile_ones_stay_text(browser, tmp_path):
    runs = [tmp_path / "plain", tmp_path / HOSTILE]
    for folder in runs:
        fill(folder, range(6))
    (runs[1] / "config.toml").write_text("vocab_size = 100\nmax_steps = 100\nmax_lr = 0.5\n")
    sample = f"{HOSTILE}\x1b[31m \u202e<script>window.hacked=1</script>"
    write_samples(runs[1], (0, 4.0, "early"), (5, 3.95, sample))
    with opened(browser, *runs, tmp_path / "not begun") as page:
        until(lambda: trace(page, "plain: training"), list(range(6)), "first run")
        validation = "document.getElementById('loss-chart').data.filter(trace => /validation/.test(trace.name))"
        until(lambda: trace(page, "plain: validation"), [0, 5], "its evaluations")
        shapes = page.evaluate(f"{validation}.map(trace => [trace.line.dash, trace.marker.symbol])")
        assert len(shapes) == 2
        assert shapes[0][0] != shapes[1][0]  # not by colour alone
        assert shapes[0][1] != shapes[1][1]
        assert HOSTILE in page.locator(".run .name").nth(1).inner_text()
        assert any("<img" in text for text in page.locator("#loss-chart .legendtext").all_text_contents())
        differing = page.locator("#differences tbody tr").all_inner_texts()
        assert [text.split() for text in differing] == [["max_lr", "0.0003", "0.5", "–"]]  # the third has none yet
        page.select_option("#sample-run", "1")
        until(
            lambda: page.locator("#sample").inner_text(), lambda text: HOSTILE in text and "\x1b" not in text, "sample"
        )
        assert "<script>" in page.locator("#sample").inner_text()
        page.locator("#sample-place").focus()
        page.keyboard.press("Home")
        until(lambda: page.locator("#sample").inner_text(), "early", "the first sample")
        assert page.evaluate("window.hacked") is None
        assert page.locator("main img:not(#comparison-picture), main script, main b:not(.bar b)").count() == 0


def test_a_try_has_its_table_and_small_multiples(browser, tmp_path):
    tried = Try(tmp_path / "t", {}, {}, [1, 2], [Setting("max_lr=0.5", {}), Setting(HOSTILE.replace("/", ""), {})])
    for place, setting in enumerate(tried.settings):
        for seed in tried.seeds:
            tried.run_dir(setting, seed).mkdir(parents=True)
            (tried.run_dir(setting, seed) / "config.toml").write_text("vocab_size = 100\nmax_steps = 10\n")
            for step in (0, 5, 10)[: 3 - place]:
                append(tried.run_dir(setting, seed), **row(step, "val", 4.0 + seed / 10 - step / 100))
    tried.save()
    with opened(browser, tmp_path / "t") as page:
        page.locator("#tries img").wait_for()
        rows = [text.split("\t") for text in page.locator("#tries tbody tr").all_inner_texts()]
        assert [(cells[0], cells[1], cells[4]) for cells in rows] == [
            ("max_lr=0.5", "4.0500", "the best"),
            (HOSTILE.replace("/", ""), "", "not finished"),
        ]
        assert page.evaluate("document.querySelector('#tries img').naturalWidth") > 300
        assert page.evaluate("window.hacked") is None
        refused = []
        page.route("**/tries", lambda route: (refused.append(route.request.url), route.abort()))
        page.clock.install()
        page.reload()
        until(lambda: len(refused), 1, "a fetch that fails")
        page.unroute("**/tries")
        assert page.locator("#tries img").count() == 0
        until(lambda: page.clock.run_for(11_000) or page.locator("#tries img").count(), 1, "the table after it")


def test_what_21_runs_of_a_try_take_of_the_page(browser, tmp_path):
    settings = [Setting(f"max_lr=0.{place}", {}) for place in range(1, 8)]
    tried = Try(tmp_path / "t", {}, {}, [1, 2, 3], settings)
    for setting in settings:
        (tried.folder / setting.name).mkdir(parents=True)
        for seed in tried.seeds:
            fill(tried.run_dir(setting, seed), range(11))
    tried.save()
    with opened(browser, tmp_path / "t", viewport={"width": 1280, "height": 800}) as page:
        page.locator("#tries img").wait_for()
        until(lambda: page.locator(".run").count(), 21, "runs")
        until(lambda: page.locator("#verdicts li").count(), lambda count: count >= 21, "verdicts")
        until(lambda: page.locator("#loss-words").inner_text(), lambda text: "seed-3" in text, "losses")
        bottom = "document.getElementById('samples').getBoundingClientRect().top + scrollY"
        assert page.evaluate(bottom) < 3000
        page.evaluate("document.getElementById('runs').scrollTo(0, 500)")
        append(tried.run_dir(settings[0], 1), **row(99))
        until(lambda: page.locator(".run").first.inner_text(), lambda text: "99 of 100" in text, "drawn again")
        assert page.evaluate("document.getElementById('runs').scrollTop") == 500


def test_the_slider_moves_curve_table_and_flags(browser, tmp_path):
    fill(tmp_path, range(3))
    with opened(browser, tmp_path) as page:
        until(lambda: page.locator("#flags").inner_text(), lambda text: "--max_steps 100 " in text, "the run's own")
        curve = "document.getElementById('schedule-chart').data[0].y"
        before, warning = page.evaluate(curve), page.locator("#schedule-warning")
        assert warning.inner_text() == ""
        page.locator("#warmup").focus()
        page.keyboard.press("End")
        until(lambda: page.locator("#flags").inner_text(), lambda text: "--warmup_steps 20 " in text, "flags")
        assert "outside the usual" in warning.inner_text()
        assert page.evaluate(curve) != before
        page.select_option("#shape", "linear")
        text = until(lambda: page.locator("#flags").inner_text(), lambda text: "--schedule linear" in text, "shape")
        last = page.locator("#schedule-table tbody tr").last.inner_text().split()
        assert last[0] == "100"
        assert float(last[1]) == float(text.split("--min_lr ")[1].split()[0])
        assert not page.locator("#cooldown").is_visible()
        page.select_option("#shape", "wsd")
        until(
            lambda: page.locator("#flags").inner_text(),
            lambda text: text.endswith("--decay_fraction 0.4"),
            "its default",
        )
        page.locator("#cooldown").focus()
        page.keyboard.press("Home")
        until(lambda: page.locator("#flags").inner_text(), lambda text: text.endswith("--decay_fraction 0.01"), "flags")
        page.locator("#floor").focus()
        page.keyboard.press("Home")
        until(lambda: page.locator("#flags").inner_text(), lambda text: "--min_lr 0.0 " in text, "a floor of 0")
        assert page.locator("#schedule-table tbody tr").last.inner_text().split() == ["100", "0"]


def test_the_playground_streams_and_shows_the_models_probabilities(browser, trained):
    with opened(browser, trained) as page:
        page.locator("#stream:enabled").wait_for()
        assert not [url for url in page.asked if "/next" in url]  # nothing is loaded before somebody plays
        page.fill("#prompt", "ab")
        page.locator("#likely tbody tr").first.wait_for()
        run = Run.open(trained)
        ids = torch.tensor([run.tokenizer.encode("ab").tolist()])
        with torch.no_grad():
            logits = run.model("best", "cpu")(ids)[0][0, -1, : run.tokenizer.vocab_size].double()
        expected = torch.softmax(logits, 0).sort(descending=True).values[:20] * 100
        assert page.input_value("#weights") == "best"
        until(lambda: shares(page, "before"), pytest.approx(expected.tolist(), abs=0.006), "the model's own")
        page.fill("#count", "12")
        page.click("#stream")
        page.locator("#written .token").nth(11).wait_for()
        page.locator("#stop[disabled]").wait_for()
        written = page.locator("#written").text_content()
        page.locator("#written .token").nth(3).click()
        assert "at token 4" in page.locator("#likely-title").inner_text()
        assert page.locator("#likely tr.drawn").count() == 1
        page.locator("#written .token").first.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        assert "at token 2" in page.locator("#likely-title").inner_text()
        page.click("#step-one")
        page.locator("#written .token").nth(12).wait_for()
        page.click("#again")
        until(lambda: page.locator("#written .token").count(), 0, "start over")
        page.fill("#stops", f"never\n{line_of(written[3:5])}")
        page.click("#stream")
        page.get_by_text("Next token, after what was cut off").wait_for()
        assert page.locator("#written").text_content() == "ab" + written[2:].partition(written[3:5])[0]
        page.fill("#stops", "")
        page.click("#step-one")  # goes on, and shows what was cut off
        until(lambda: page.locator("#written").text_content()[:5], written[:5], "all of it")
        page.click("#again")
        page.locator("#top_k").focus()
        page.keyboard.press("ArrowRight")  # top-k 1: one token is sure
        until(lambda: shares(page, "after")[:2], [100.0, 0.0], "after top-k 1")
        until(lambda: shares(page, "before"), pytest.approx(expected.tolist(), abs=0.006), "the model's own")
        page.select_option("#weights", "last")
        page.locator("#top_k").focus()
        page.keyboard.press("Home")
        page.locator("#temperature").focus()
        page.keyboard.press("Home")  # temperature 0: the likeliest is sure
        until(lambda: shares(page, "temperature")[:2], [100.0, 0.0], "after temperature 0")
        page.fill("#prompt", "\u00e9")
        until(lambda: page.locator("#play-words").get_attribute("class"), "bad", "an error in words")
        assert page.locator("#play-words").inner_text()
        assert page.locator("#likely").is_hidden()  # what it showed was said of another prompt
        assert page.locator("#likely-words").inner_text() == ""


def line_of(stop):
    """A stop text as one types it."""
    return stop.replace("\\", "\\\\").replace("\n", "\\n")


def test_of_a_model_without_a_record_only_the_playground_is_there(browser, trained, tmp_path):
    shutil.copy(trained / "model.pt", tmp_path / "bare.pt")
    shutil.copy(trained / "tokenizer.json", tmp_path)
    with opened(browser, tmp_path / "bare.pt") as page:
        page.wait_for_selector("#stream:not([disabled])")
        shown = page.locator("section:visible, nav a:visible").evaluate_all(
            "all => all.map((one) => one.id || one.hash)"
        )
        assert shown == ["#playground", "runs", "playground"]
        page.fill("#prompt", "ab")
        page.fill("#count", "5")
        page.click("#stream")
        page.wait_for_selector("#written .token >> nth=4")


def test_a_prompt_typed_before_the_runs_are_known_stays(browser, trained):
    with opened(browser, trained) as page:
        held = []
        page.route("**/events", lambda route: held.append(route))
        page.reload()
        until(lambda: len(held) or page.wait_for_timeout(10), 1, "asked for the runs")
        assert page.locator("#stream").is_disabled()
        page.fill("#prompt", "ab")
        held[0].continue_()
        page.locator("#likely tbody tr").first.wait_for()
        assert page.input_value("#prompt") == "ab"
        assert page.locator("#written").inner_text() == "ab"


def shares(page, stage):
    """The percentages of a column of the next token's table, 0 where a knob has ruled a token out."""
    texts = page.locator(f"#likely .bar.{stage}").all_inner_texts()
    return [0.0 if text == "–" else float(text.split()[0]) for text in texts]


def test_the_page_is_used_by_keys_on_a_narrow_dark_screen(browser, tmp_path):
    fill(tmp_path, range(50))
    with opened(browser, tmp_path, viewport={"width": 360, "height": 700}, color_scheme="dark") as page:
        until(lambda: trace(page, "validation")[-1:], [45], "rows")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"
        names = "[...document.querySelectorAll('input, select, textarea')].filter(e => !e.labels.length).map(e => e.id)"
        assert page.evaluate(names) == []
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.getAttribute('href')") == "#curves"
        chart, reach = page.locator("#loss-chart"), "document.getElementById('loss-chart')._fullLayout.xaxis.range"
        assert "lowest validation loss 3.550 at step 45" in chart.get_attribute("aria-label")
        chart.focus()
        from_, to = page.evaluate(reach)
        page.keyboard.press("+")
        until(lambda: page.evaluate(reach), pytest.approx([from_ + (to - from_) / 4, to - (to - from_) / 4]), "zoom")
        fill(tmp_path, range(50, 60))
        until(lambda: trace(page, "validation")[-1:], [55], "more rows")
        assert page.evaluate(reach)[1] < 50  # which leave the zoom as it is
        page.keyboard.press("0")
        until(lambda: page.evaluate(reach), lambda ends: ends[1] > 55, "all of it")
        page.locator("#evaluations summary").click()
        until(lambda: page.locator("#evaluations-table tbody tr").count(), 12, "the table of evaluations")
        assert "3.4500" in page.locator("#evaluations-table tbody tr").last.inner_text()


def test_the_average_of_the_weights_stands_beside_them_in_both_units(browser, tmp_path):
    (tmp_path / "config.toml").write_text(
        'vocab_size = 100\nmax_steps = 100\nema = 0.9\nmax_lr = 0.001\noptimizer = "muon"\nmuon_lr = 0.02\n'
    )
    for step, average in ((0, 4.0), (5, 3.0), (10, 2.0)):
        append(tmp_path, **row(step))
        append(
            tmp_path, **row(step, "val", 4.0 - step / 100), bits_per_byte=(4.0 - step / 100) / 2, val_loss_ema=average
        )
    heights = "name => document.getElementById('loss-chart').data.find(trace => trace.name === name).y.map(Number)"
    with opened(browser, tmp_path) as page:
        until(lambda: trace(page, "average"), [0, 5, 10], "the average")
        assert page.evaluate(heights, "average") == [4, 3, 2]
        assert "of these weights\ntheir average" in page.locator(".run").inner_text()
        page.select_option("#measure", "bits")
        until(lambda: page.evaluate(heights, "average"), pytest.approx([2, 1.5, 1]), "its bits per byte")
        assert page.evaluate(heights, "validation") == pytest.approx([2, 1.975, 1.95])
        words = "lowest validation bits per byte 1.000 at step 10 by the average of the weights"
        assert words in page.locator("#loss-words").inner_text()
        page.locator("#evaluations summary").click()
        cells = page.locator("#evaluations-table tr").last.locator("td")
        until(cells.count, 8, "the table of evaluations")
        assert cells.all_inner_texts()[4:] == ["3.9000", "1.9500", "2.0000", "1.0000"]
        assert "--muon_lr 0.02" in page.locator("#muon-words").inner_text()
        shown = "document.getElementById('lr-chart').data.map(trace => [trace.hovertemplate, trace.text.at(0)])"
        assert all("Muon %{text}" in hover for hover, _ in page.evaluate(shown))
        assert page.evaluate(shown)[1][1] == "2.000e-2"  # where the record has 1e-3


def test_the_page_says_that_its_server_has_ended_and_keeps_the_curve(browser, tmp_path):
    fill(tmp_path, range(6))
    with opened(browser, tmp_path) as page:
        until(lambda: len(trace(page, "training")), 6, "rows")
        fill(tmp_path, range(6, 11))
        page.server.terminate()  # the last rows still come
        page.get_by_text("this page's server has stopped").wait_for()
        until(lambda: trace(page, "training"), list(range(11)), "after the end")


def test_an_exported_page_runs_the_model_without_server_and_network(browser, trained, tmp_path):
    run = Run.open(trained)
    made = tmp_path / "model.html"
    assert main(f"export {trained} --to html --dtype float32 --out {made}".split()) == 0
    context = browser.new_context(viewport={"width": 360, "height": 700}, color_scheme="dark", offline=True)
    page = context.new_page()
    page.set_default_timeout(WAIT)
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text))
    page.goto(made.as_uri())
    page.locator("#likely tbody tr").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.fill("#prompt", "ab")
    page.locator("#temperature").focus()
    page.keyboard.press("Home")  # temperature 0: the likeliest is sure
    page.locator("#count").focus()
    page.keyboard.press("Home")
    page.click("#go")
    until(lambda: page.locator("#written .token").count(), 20, "20 tokens")
    expected = run.sample("ab", 20, weights="best", temperature=0.0)
    assert page.locator("#written").text_content() == expected
    page.locator("#go:not([disabled])").wait_for()
    page.locator("#written .token").nth(3).click()
    assert page.locator("#likely-title").inner_text() == "Likely at token 4"
    drawn = page.locator("#likely tr.drawn")
    assert drawn.locator("th").inner_text().removeprefix("▸ ") == expected[5].replace(" ", "␣").replace("\n", "↵")
    assert drawn.locator(".after").inner_text() == "100.0 %"
    page.click("#go")  # goes on
    until(lambda: page.locator("#written .token").count(), 40, "40 tokens")
    whole = run.sample("ab", 40, weights="best", temperature=0.0)
    assert page.locator("#written").text_content() == whole
    until(lambda: page.locator("#go").is_enabled(), True, "the end of it")
    stop = whole[5:7]  # of one token each
    page.fill("#stops", f"never\n{line_of(stop)}")
    page.click("#again")
    page.click("#go")
    page.get_by_text("Stopped before a stop text").wait_for()
    stopped = run.sample("ab", 40, weights="best", temperature=0.0, stop=stop)
    assert page.locator("#written").text_content() == stopped == "ab" + whole[2:].partition(stop)[0]
    page.fill("#stops", "")
    page.click("#go")  # goes on, and shows what was cut off
    until(lambda: page.locator("#written").text_content()[:20], whole[:20], "all of it")
    page.fill("#prompt", "\u00e9")
    until(lambda: page.locator("#words").get_attribute("class"), "bad", "a character without a token")
    assert "never seen" in page.locator("#words").inner_text()
    context.close()
    assert asked == [made.as_uri()]
    assert wrong == []


class AnotherSite(BaseHTTPRequestHandler):
    """A page of another server on this machine."""

    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<h1>another site</h1>")

    def log_message(self, *words):
        pass


def test_another_site_reaches_nothing_even_with_the_address(browser, tmp_path):
    fill(tmp_path, range(3))
    with ThreadingHTTPServer(("127.0.0.1", 0), AnotherSite) as site, opened(browser, tmp_path) as page:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        page.locator(".run").wait_for()
        page.goto(f"http://127.0.0.1:{site.server_port}/")
        asking = "([address, mode]) => fetch(address, {method: 'POST', body: '{}', mode}).then(() => 'yes', () => 'no')"
        for mode in ("cors", "no-cors"):
            assert page.evaluate(asking, [f"{page.address}runs/0/next", mode]) == "no"
        assert page.evaluate(asking, [f"http://127.0.0.1:{site.server_port}/", "cors"]) == "yes"
        framed = "address => {const f = document.createElement('iframe'); f.src = address; document.body.append(f)}"
        page.evaluate(framed, page.address)
        page.wait_for_load_state("networkidle")  # of the frame too
        assert page.frames[-1].url == "chrome-error://chromewebdata/"  # it stays empty
        (complaint,) = page.wrong
        assert "frame-ancestors 'none'" in complaint
        page.wrong.clear()
        site.shutdown()
