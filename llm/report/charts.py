"""Draw a report's charts: losses, and what else the record has."""

from llm.record.chart_style import format_loss
from llm.record.metrics import overfits_since
from llm.record.plot import landmark_losses
from llm.report.chart import Chart, Curve
from llm.report.facts import Report

OTHERS = (  # name, title, key of the record
    ("lr", "Learning rate", "lr"),
    ("norm", "Gradient norm, before clipping", "grad_norm"),
    ("speed", "Tokens per second", "tokens_per_second"),
)


def make_charts(report: Report) -> list[Chart]:
    """Return the charts of a run, as far as the record has their numbers: losses, then OTHERS."""
    charts = [make_loss_chart(report)]
    charts += [make_line_chart(report, name, _title(report, name, title), key) for name, title, key in OTHERS]
    return [chart for chart in charts if chart is not None]


def _title(report: Report, name: str, title: str) -> str:
    config = report.config
    if name != "lr" or config.optimizer != "muon":
        return title
    return f"{title} of AdamW; Muon's is {config.muon_lr / config.max_lr:.3g} times that"


def make_loss_chart(report: Report) -> Chart | None:
    """Return the losses with the landmarks, the best evaluation, and the reference band."""
    val = report.points("loss", "val")
    train = report.points("loss")
    averaged = report.points("val_loss_ema", "val")
    lowest = report.lowest
    if not val and not train:
        return None
    levels = landmark_losses(report.config.model.vocab_size)
    values = [loss for _, loss in [*val, *averaged, *train]] + [level for level, _ in levels]
    ceiling = max(1.5 * levels[0][0], min(values)) if levels else max(values)
    bottom = min(values)
    top = min(max(values), ceiling)
    pad = 0.05 * (top - bottom) or 0.5
    parts = [
        f"{name} loss {format_loss(curve[0][1])} at first and {format_loss(curve[-1][1])} at last"
        for name, curve in (("validation", val), ("training", train))
        if curve
    ]
    if lowest:
        parts.append(f"lowest validation loss {format_loss(lowest['loss'])} at step {lowest['step']:,}")
    curves = [Curve("training", "train", train), Curve("validation", "val", val, dots=True)]
    if averaged:
        curves.append(Curve("average", "average", averaged))
    return Chart(
        name="loss",
        title="Loss, nats per token",
        words="; ".join(parts),
        end=max(report.step, 1),
        low=bottom - pad,
        high=top + pad,
        curves=curves,
        levels=[(level, f"{name} = {level:.2f}") for level, name in levels],
        star=(lowest["step"], lowest["loss"], f"best {format_loss(lowest['loss'])}") if lowest else None,
        band=_band_points(report),
        shaded_from=overfits_since(report.rows),
    )


def _band_points(report: Report) -> list[tuple[int, float, float]]:
    """Return (step, lower, upper) of the reference band, up to the run's last step."""
    if report.band is None:
        return []
    points = []
    for step in report.band.steps:
        interval = report.band.at(step)
        if step <= report.step and interval is not None:
            points.append((step, *interval))
    return points


def make_line_chart(report: Report, name: str, title: str, key: str) -> Chart | None:
    """Return a chart of one recorded number over the steps, from zero; None if no row has it."""
    points = report.points(key)
    if not points:
        return None
    values = [value for _, value in points]
    return Chart(
        name=name,
        title=title,
        words=f"{title}: {values[0]:.3g} at first, {values[-1]:.3g} at last, {min(values):.3g} to {max(values):.3g}",
        end=max(report.step, 1),
        low=min(0.0, min(values)),
        high=1.08 * max(values) or 1.0,
        curves=(Curve(name, "", points),),
    )
