"""Write a try as one HTML file: its table, small multiples, differences and best setting. It has no script."""

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from llm.experiments.compare import compare_pair
from llm.experiments.comparison_picture import draw_comparisons
from llm.experiments.outcome import Outcome, best_toml, columns, outcomes
from llm.experiments.picture import alternative, draw_try
from llm.experiments.recorded import Group, recorded_run
from llm.experiments.trials import Try, read_try
from llm.record.chart_style import data_url
from llm.report.write_html import MARK, read_part, security_policy, template_environment, write_page

COMPARED = 6  # settings in the picture of differences, at most: more lines cannot be told apart
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
    reference = next((outcome for outcome in found if outcome.is_reference), None)
    return MARK + template_environment().from_string(read_part("try.html")).render(
        name=folder.resolve().name,
        count=len(tried.settings),
        seeds=len(tried.seeds),
        best=found[0].setting.name if found and found[0].losses else "",
        columns=list(table),
        rows=list(zip(*table.values(), strict=True)),
        alt=alternative(found),
        picture=data_url(draw_try(tried, found)),
        differences=differences_url(tried, found, reference) if reference else "",
        compared=COMPARED,
        reference=reference.setting.name if reference else "",
        toml=best_toml(tried, found),
        style=Markup(style),
        policy=security_policy(style, ""),
    )


def differences_url(tried: Try, found: Sequence[Outcome], reference: Outcome) -> str:
    """Return the picture of the best settings and their differences from the reference; "" if nothing compares."""
    shown = [reference, *(outcome for outcome in found if not outcome.is_reference)]
    groups: list[Group] = []
    names = {}
    for outcome in shown:
        places = [tried.run_dir(outcome.setting, run.config.seed) for run in outcome.runs]
        runs = [recorded_run(place, run.config, run.rows) for place, run in zip(places, outcome.runs, strict=True)]
        if runs and all(run.evaluations for run in runs) and len(groups) < COMPARED:
            letter = chr(ord("A") + len(groups))
            groups.append(Group(letter, runs))
            names[letter] = outcome.setting.name
    if names.get("A") != reference.setting.name:
        return ""  # the reference has no evaluation yet
    comparisons = [compare_pair(groups[0], other) for other in groups[1:]]
    if not any(comparison.findings for comparison in comparisons):
        return ""
    return data_url(draw_comparisons(groups, comparisons, names))
