"""Draw a try as small multiples: a panel for each setting, with the validation losses of its seeds."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm.experiments.outcome import Outcome
from llm.experiments.trials import Try
from llm.record.chart_style import COLOURS, GREY, plain
from llm.record.metrics import losses

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = 60  # at most
LIGHT = "#bbbbbb"


def draw_try(tried: Try, found: Sequence[Outcome]) -> "Figure":
    """Return the figure. In every panel, the curves of the first outcome, the best, are grey in the background."""
    from matplotlib.figure import Figure

    shown = found[:PANELS]
    curves = [[points for run in outcome.runs if (points := losses(run.rows, "val"))] for outcome in shown]
    across = min(4, max(1, len(shown)))
    down = max(1, math.ceil(len(shown) / across))
    figure = Figure(figsize=(3.1 * across, 2 * down + 0.6), dpi=130, layout="constrained")
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    points = [point for runs in curves for run in runs for point in run]
    end = max((step for step, _ in points), default=1)
    settled = [loss for step, loss in points if step >= end / 20]  # the first fall would flatten the rest
    for panel in panels.flat[len(shown) :]:
        panel.set_visible(False)
    for panel in panels.flat[max(0, len(shown) - across) : len(shown)]:  # the lowest of each column has the steps
        panel.tick_params(labelbottom=True)
    for panel, outcome, runs in zip(panels.flat, shown, curves, strict=False):
        for run in curves[0]:
            panel.plot(*zip(*run, strict=True), color=LIGHT, linewidth=1)
        for run, colour in zip(runs, COLOURS * len(runs), strict=False):
            panel.plot(*zip(*run, strict=True), color=colour, linewidth=1.3, marker="o", markersize=2.5)
        mean = outcome.words.partition(":")[0] if outcome.mean is None else f"{outcome.mean:.4f}"
        name = plain(outcome.setting.name.replace(",", ", "), 40)
        panel.set_title(f"{name}\n{mean}", loc="left", fontsize=9, parse_math=False)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    if settled:
        low, high = min(settled), max(settled)
        panels.flat[0].set_ylim(low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1))
    seeds = f"{len(tried.seeds)} seed{'s' * (len(tried.seeds) > 1)}"
    figure.suptitle(
        f"validation loss (nats per token) over the steps; {seeds} each, the best in grey",
        fontsize=10,
        x=0.01,
        ha="left",
        color=GREY,
    )
    return figure


def alternative(found: Sequence[Outcome]) -> str:
    """Return the picture in words."""
    settings = "; ".join(f"{outcome.setting.name}: {outcome.words}" for outcome in found)
    return f"Validation loss over the steps, a panel for each setting: {settings}"
