"""A report as one HTML file that needs nothing else: no network, no other file, no script to be read.

Every text goes through Jinja's escaping. The page's policy lets it ask nowhere for anything, and run no script but its
own, which adds reading out and zooming to charts that are there without it.
"""

import base64
import hashlib
import json
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from llm import storage
from llm.errors import UserError
from llm.record.chart_style import spelled
from llm.record.metrics import overfits_since
from llm.record.plot import landmark_losses
from llm.record.verdicts import MEANINGS
from llm.report.card import N
from llm.report.chart import Chart, Curve
from llm.report.facts import Report
from llm.report.words import writable

MARK = "<!DOCTYPE html>\n<!-- losscurve report -->"  # how an earlier report is known


def write_html(report: Report, out: Path) -> None:
    """Write `out`, whole or not at all. Raises UserError where it cannot be written or is no earlier report."""
    writable(out, MARK.encode())
    try:
        storage.write_text(out, page(report))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from None


def page(report: Report) -> str:
    """The page's HTML."""
    files = resources.files("llm.report")
    template, style, script = (
        files.joinpath(f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    charts = charts_of(report)
    data = json.dumps({chart.name: chart.data() for chart in charts}, separators=(",", ":"))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"thousands": "{:,}".format, "duration": duration, "rounded": rounded, "spelled": spelled}
    return MARK + environment.from_string(template).render(
        report=report,
        charts=charts,
        overfits=overfits_since(report.rows),
        landmarks=[
            (name, level, means)
            for (level, name), means in zip(landmark_losses(report.config.model.vocab_size), MEANINGS, strict=False)
        ],
        n=N,
        style=Markup(style),
        script=Markup(script),
        data=Markup(data.replace("<", "\\u003c")),  # no name in it can end the script element
        policy=policy(style, script),
    )


def policy(style: str, script: str) -> str:
    """The page's Content-Security-Policy: nothing but its own style sheet and script, known by their hashes."""

    def named(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; style-src {named(style)}; script-src {named(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def charts_of(report: Report) -> list[Chart]:
    """The charts of a run: losses, then what is recorded of learning rate, gradient norm and speed."""
    others = (
        ("lr", "Learning rate", "lr"),
        ("norm", "Gradient norm, before clipping", "grad_norm"),
        ("speed", "Tokens per second", "tokens_per_second"),
    )
    made = [loss_chart(report), *(line_chart(report, *what) for what in others)]
    return [chart for chart in made if chart is not None]


def loss_chart(report: Report) -> Chart | None:
    """Losses with the landmarks, the best evaluation, and the band where such runs lie."""
    val, train, low = report.points("loss", "val"), report.points("loss"), report.lowest
    if not val and not train:
        return None
    levels = landmark_losses(report.config.model.vocab_size)
    shown = [y for _, y in [*val, *train]] + [level for level, _ in levels]
    ceiling = max(1.5 * levels[0][0], min(shown)) if levels else max(shown)
    bottom, top = min(shown), min(max(shown), ceiling)
    pad = 0.05 * (top - bottom) or 0.5
    words = "; ".join(
        f"{name} loss {spelled(curve[0][1])} at first and {spelled(curve[-1][1])} at last"
        for name, curve in (("validation", val), ("training", train))
        if curve
    )
    return Chart(
        name="loss",
        title="Loss, nats per token",
        words=words + (f"; lowest validation loss {spelled(low['loss'])} at step {low['step']:,}" if low else ""),
        end=max(report.step, 1),
        low=bottom - pad,
        high=top + pad,
        curves=(Curve("training", "train", train), Curve("validation", "val", val, dots=True)),
        levels=[(level, f"{name} = {level:.2f}") for level, name in levels],
        star=(low["step"], low["loss"], f"best {spelled(low['loss'])}") if low else None,
        band=band_points(report),
        shaded_from=overfits_since(report.rows),
    )


def band_points(report: Report) -> list[tuple[int, float, float]]:
    """(step, lower, upper) of the band, as far as the run has come."""
    band = report.band
    if band is None:
        return []
    ends = [(step, band.at(step)) for step in band.steps if step <= report.step]
    return [(step, *end) for step, end in ends if end is not None]


def line_chart(report: Report, name: str, title: str, key: str) -> Chart | None:
    """One recorded number over the steps, from zero."""
    points = report.points(key)
    if not points:
        return None
    values = [y for _, y in points]
    top = 1.08 * max(values) or 1.0
    words = f"{title}: {values[0]:.3g} at first, {values[-1]:.3g} at last, {min(values):.3g} to {max(values):.3g}"
    return Chart(name, title, words, max(report.step, 1), min(0.0, min(values)), top, (Curve(name, "", points),))


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def rounded(count: int) -> str:
    """A large number in three digits."""
    for size, unit in ((10**9, "G"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"
