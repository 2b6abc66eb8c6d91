"""Write a try as one HTML file: its table, its small multiples and its best setting. It has no script."""

import base64
import io
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from llm import storage
from llm.errors import UserError
from llm.experiments.outcome import best_toml, columns, outcomes
from llm.experiments.picture import draw_try
from llm.experiments.trials import read_try
from llm.report.words import check_overwritable
from llm.report.write_html import MARK, security_policy

STYLE = ".multiples { max-width: 100%; background: #fff; border-radius: 6px; }\n"


def write_try(folder: Path, out: Path) -> None:
    """Write the report of the try in `folder` to `out`, complete or not at all.

    Raises:
        UserError: the try is damaged, `out` exists and is not an earlier report, or it cannot be written.
    """
    check_overwritable(out, MARK.encode())
    try:
        storage.write_text(out, try_page(folder))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from None


def try_page(folder: Path) -> str:
    """Return the HTML of a try. Folders are named by their last part, because a report is meant to be shared."""
    tried = read_try(folder)
    found = outcomes(tried)
    table = columns(tried, found)
    picture = io.BytesIO()
    draw_try(tried, found).savefig(picture, format="png")
    style = resources.files("llm.report").joinpath("report.css").read_text(encoding="utf-8") + STYLE
    template = resources.files("llm.report").joinpath("try.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return MARK + environment.from_string(template).render(
        name=folder.resolve().name,
        count=len(tried.settings),
        seeds=len(tried.seeds),
        best=found[0].setting.name if found and found[0].losses else "",
        columns=list(table),
        rows=list(zip(*table.values(), strict=True)),
        alt="; ".join(f"{outcome.setting.name}: {outcome.words}" for outcome in found),
        picture=base64.b64encode(picture.getvalue()).decode(),
        toml=best_toml(tried, found),
        style=Markup(style),
        policy=security_policy(style, ""),
    )
