"""The live page in a real browser: Chromium without a window, driven by Playwright."""

import json
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import append, flags, words

from llm.commands.main import main

for package in ("starlette", "uvicorn", "plotly"):
    pytest.importorskip(package)
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome here")
ARGUMENTS = [
    *("--no-sandbox", "--headless", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
COMMAND = "import sys; from llm.commands.watch import main; sys.exit(main(sys.argv[1:]))"
HOSTILE = "<img src=x onerror=window.hacked=1><b>bold"
WAIT = 15_000  # milliseconds, of what takes one or two seconds


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
def opened(browser, *runs: Path):
    """The page of some run folders, served by the command; fails if it asks for anything outside this machine."""
    command = [sys.executable, "-c", COMMAND, *map(str, runs)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    asked, wrong = [], []
    try:
        address = server.stdout.readline().split(" at ")[-1].split()[0]
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        page.address = address
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
        assert trace(page, "validation") == [0, 5, 10]
        assert "3.900 at 10" in page.locator(".run").inner_text()
        page.reload()
        assert "token" not in page.url
        until(lambda: trace(page, "training"), list(range(11)), "after a reload")
        (run / "metrics.jsonl").unlink()
        fill(run, range(3))
        until(lambda: trace(page, "training"), [0, 1, 2], "after a restart")
        page.select_option("#axis", "tokens")
        until(lambda: trace(page, "training"), [0, 64, 128], "over tokens")
        page.select_option("#axis", "time")
        until(lambda: trace(page, "training")[-1], pytest.approx(1 / 60), "over minutes")
        shutil.rmtree(run)
        page.get_by_text("waiting for a run").wait_for()
        assert trace(page, "training") == []


def test_two_runs_lie_over_each_other_and_hostile_ones_stay_text(browser, tmp_path):
    runs = [tmp_path / "plain", tmp_path / HOSTILE]
    for folder in runs:
        fill(folder, range(6))
    (runs[1] / "config.toml").write_text("vocab_size = 100\nmax_steps = 100\nmax_lr = 0.5\n")
    sample = f"{HOSTILE}\x1b[31m \u202e<script>window.hacked=1</script>"
    (runs[1] / "samples.txt").write_text(
        f"--- step 0 | val 4.0000 ---\nearly\n\n--- step 5 | val 3.9500 ---\n{sample}\n\n", encoding="utf-8"
    )
    with opened(browser, *runs) as page:
        until(lambda: trace(page, "plain: training"), list(range(6)), "first run")
        validation = "document.getElementById('loss-chart').data.filter(trace => /validation/.test(trace.name))"
        shapes = page.evaluate(f"{validation}.map(trace => [trace.line.dash, trace.marker.symbol])")
        assert len(shapes) == 2
        assert shapes[0][0] != shapes[1][0]  # not by colour alone
        assert shapes[0][1] != shapes[1][1]
        assert HOSTILE in page.locator(".run .name").nth(1).inner_text()
        assert any("<img" in text for text in page.locator("#loss-chart .legendtext").all_text_contents())
        differing = page.locator("#settings-table tr.differs").all_inner_texts()
        assert len(differing) >= 1
        assert "max_lr" in " ".join(differing)
        page.select_option("#sample-run", "1")
        until(
            lambda: page.locator("#sample").inner_text(), lambda text: HOSTILE in text and "\x1b" not in text, "sample"
        )
        assert "<script>" in page.locator("#sample").inner_text()
        page.locator("#sample-place").focus()
        page.keyboard.press("Home")
        assert page.locator("#sample").inner_text() == "early"
        assert page.evaluate("window.hacked") is None
        assert page.locator("main img, main script, main b:not(.bar b)").count() == 0


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


def test_the_playground_streams_and_shows_the_models_probabilities(browser, trained):
    with opened(browser, trained) as page:
        page.locator("#likely tbody tr").first.wait_for()
        page.fill("#prompt", "ab")
        page.fill("#count", "12")
        page.click("#stream")
        page.locator("#written .token").nth(11).wait_for()
        page.locator("#stop[disabled]").wait_for()
        page.locator("#written .token").nth(3).click()
        assert "at token 4" in page.locator("#likely-title").inner_text()
        assert page.locator("#likely tr.drawn").count() == 1
        page.click("#step-one")
        page.locator("#written .token").nth(12).wait_for()
        page.click("#again")
        until(lambda: page.locator("#written .token").count(), 0, "start over")
        with page.expect_response("**/next") as answer:
            page.locator("#top_k").focus()
            page.keyboard.press("ArrowRight")  # top-k 1: one token is sure
        found = answer.value.json()
        until(lambda: page.locator("#likely .bar.after").first.inner_text(), "100.00 %", "after top-k 1")
        shown = [float(text.split()[0]) for text in page.locator("#likely .bar.before").all_inner_texts()]
        assert shown == pytest.approx([100 * token["before"] for token in found["likely"]], abs=0.006)
        assert json.dumps(found["likely"][1]["after"]) == "0.0"
        page.fill("#prompt", "\u00e9")
        until(lambda: page.locator("#play-words").get_attribute("class"), "bad", "an error in words")
        assert page.locator("#play-words").inner_text()
