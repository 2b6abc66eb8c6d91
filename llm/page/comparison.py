"""The comparison of the runs of the page, as `losscurve compare` prints and draws it, without evaluating weights."""

from collections.abc import Sequence
from pathlib import Path

from llm.errors import UserError
from llm.experiments.compare import compare
from llm.experiments.comparison_picture import draw_comparisons
from llm.experiments.words import report_lines
from llm.record.chart_style import data_url


def comparison_of(paths: Sequence[Path]) -> dict[str, str]:
    """Return {"words": the verdicts, "picture": a data URL, "" if there is nothing to draw}."""
    try:
        groups, comparisons, notes = compare(paths, with_weights=False)
    except UserError as error:  # such as a run that is damaged
        return {"words": str(error), "picture": ""}
    lines = [*notes, *report_lines(groups, comparisons)]
    if not any(comparison.findings for comparison in comparisons):
        return {"words": "\n".join(lines), "picture": ""}
    return {"words": "\n".join(lines), "picture": data_url(draw_comparisons(groups, comparisons))}
