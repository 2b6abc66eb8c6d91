"""Write a try as one HTML file: its table, its small multiples and its best setting. It has no script."""

from pathlib import Path

from markupsafe import Markup

from llm.experiments.outcome import best_toml, columns, outcomes
from llm.experiments.picture import alternative, picture_url
from llm.experiments.trials import read_try
from llm.report.write_html import MARK, read_part, security_policy, template_environment, write_page

STYLE = ".multiples { max-width: 100%; background: #fff; border-radius: 6px; }\n"


def write_try(folder: Path, out: Path) -> None:
    """Write the report of the try in `folder` to `out`, complete or not at all.

    Raises:
        UserError: the try is damaged, `out` exists and is not an earlier report, or it cannot be written.
    """
    write_page(out, lambda: try_page(folder))


def try_page(folder: Path) -> str:
    """Return the HTML of a try. Folders are named by their last part, because a report is meant to be shared."""
    tried = read_try(folder)
    found = outcomes(tried)
    table = columns(tried, found)
    style = read_part("report.css") + STYLE
    return MARK + template_environment().from_string(read_part("try.html")).render(
        name=folder.resolve().name,
        count=len(tried.settings),
        seeds=len(tried.seeds),
        best=found[0].setting.name if found and found[0].losses else "",
        columns=list(table),
        rows=list(zip(*table.values(), strict=True)),
        alt=alternative(found),
        picture=picture_url(tried, found),
        toml=best_toml(tried, found),
        style=Markup(style),
        policy=security_policy(style, ""),
    )
