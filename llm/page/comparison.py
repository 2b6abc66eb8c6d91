"""The comparison of the runs of the page, as `losscurve compare` prints and draws it, without evaluating weights."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from llm.errors import UserError
from llm.experiments import words
from llm.experiments.compare import compare
from llm.experiments.comparison_picture import draw_comparisons


def comparison_of(paths: Sequence[Path]) -> dict[str, str]:
    """Return {"words": the verdicts, "picture": a data URL, "" if there is nothing to draw}."""
    try:
        groups, comparisons, notes = compare(paths, with_weights=False)
    except UserError as error:  # such as a run that has no record yet
        return {"words": str(error), "picture": ""}
    lines = [*notes, *words.setting_lines(groups)]
    for comparison in comparisons:
        lines += ["", *words.comparison_lines(comparison)]
    lines += ["", *words.closing_lines(comparisons)] if comparisons else [words.spread_line(groups[0])]
    if not any(comparison.findings for comparison in comparisons):
        return {"words": "\n".join(lines), "picture": ""}
    picture = io.BytesIO()
    draw_comparisons(groups, comparisons).savefig(picture, format="png")
    encoded = base64.b64encode(picture.getvalue()).decode()
    return {"words": "\n".join(lines), "picture": f"data:image/png;base64,{encoded}"}
