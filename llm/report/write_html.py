"""Write a report as one HTML file without external resources: no network, no other file, no script needed to read it.

Jinja escapes every text. The page's Content-Security-Policy blocks all requests and all scripts except its own, which
shows values and zooms; the charts are in the page without it.
"""

import base64
import hashlib
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from llm import storage
from llm.errors import UserError
from llm.record.chart_style import format_loss
from llm.record.metrics import overfits_since
from llm.record.plot import landmark_losses
from llm.record.verdicts import MEANINGS
from llm.report.charts import make_charts
from llm.report.facts import Report
from llm.report.memorisation import N
from llm.report.words import check_overwritable
from llm.schedule import format_lr

MARK = "<!DOCTYPE html>\n<!-- losscurve report -->"  # identifies an earlier report


def write_html(report: Report, out: Path) -> None:
    """Write `out`, complete or not at all.

    Raises:
        UserError: `out` exists and is not an earlier report, or it cannot be written.
    """
    write_page(out, lambda: page(report))


def write_page(out: Path, make: Callable[[], str]) -> None:
    """Write the page that `make` returns to `out`, complete or not at all. Raises UserError, as `write_html` does."""
    check_overwritable(out, MARK.encode())
    try:
        storage.write_text(out, make())
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from None


def page(report: Report) -> str:
    """Return the HTML of a report."""
    template = read_part("report.html")
    style = read_part("report.css")
    script = read_part("report.js")
    charts = make_charts(report)
    data = json.dumps({chart.name: chart.data() for chart in charts}, separators=(",", ":"))
    environment = template_environment()
    environment.filters |= {
        "thousands": "{:,}".format,
        "duration": format_duration,
        "rounded": format_count,
        "loss": format_loss,
        "lr": format_lr,
    }
    landmarks = zip(landmark_losses(report.config.model.vocab_size), MEANINGS, strict=False)
    return MARK + environment.from_string(template).render(
        report=report,
        charts=charts,
        overfits=overfits_since(report.rows),
        landmarks=[(name, level, meaning) for (level, name), meaning in landmarks],
        n=N,
        style=Markup(style),
        script=Markup(script),
        data=Markup(data.replace("<", "\\u003c")),  # so that no name in it can end the script element
        policy=security_policy(style, script),
    )


def template_environment() -> jinja2.Environment:
    """Return how all reports read their templates: every text is escaped, and a missing name is an error."""
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def read_part(name: str) -> str:
    """Return a file of this folder: a template, a style sheet or a script."""
    return resources.files("llm.report").joinpath(name).read_text(encoding="utf-8")


def security_policy(style: str, script: str) -> str:
    """Return the page's Content-Security-Policy: only its own style sheet and script, identified by their hashes."""

    def hash_source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; style-src {hash_source(style)}; script-src {hash_source(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def format_duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def format_count(count: int) -> str:
    """Return a large number with three digits."""
    for size, unit in ((10**9, "G"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"
