"""Draw pictures: the loss curve of one run or several, a schedule, a forecast of scaling."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm.config import TrainConfig, read_toml
from llm.record.bands import Band, band_of_run, band_verdict
from llm.record.chart_style import (
    COLOURS,
    DARK,
    EMA,
    GREY,
    MARKERS,
    SHADING,
    TRAIN,
    VAL,
    add_curve,
    add_end_labels,
    add_learning_rate,
    add_star,
    add_text,
    format_loss,
    make_canvas,
    plain,
    save_figure,
    set_height,
    step_and_height,
)
from llm.record.metrics import best, losses, overfits_since, read_record
from llm.record.points import Points, thin_by_mean
from llm.record.runs import Origin, origin_of
from llm.schedule import decay_start, lr_at
from llm.storage.lines import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS_LABEL = "loss (nats per token)"

# of V tokens: ln V knows nothing, ln V / 2 knows token frequencies, ln V / 4 writes some English
LANDMARKS = ((1, "ln V"), (2, "ln V / 2"), (4, "ln V / 4"))

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # no warnings about its caches and fonts


def plot_runs(run_dirs: Sequence[Path], out: Path) -> None:
    """Draw one run, or several together, into the file `out`, in the format of its extension.

    Raises:
        UserError: a run is missing or damaged, or `out` cannot be written.
    """
    save_figure(lambda: draw(run_dirs), out)


def plot_schedule(config: TrainConfig, out: Path) -> None:
    """Draw the learning rate over the steps into the file `out`.

    Raises:
        UserError: `out` cannot be written.
    """
    save_figure(lambda: draw_schedule(config), out)


def plot_scaling(curves: dict[str, list[tuple[float, float]]], title: str, out: Path) -> None:
    """Draw the scaling efficiency (0 to 1) over the number of accelerators, with each curve's name at its end.

    Raises:
        UserError: `out` cannot be written.
    """
    save_figure(lambda: draw_scaling(curves, title), out)


def draw_scaling(curves: dict[str, list[tuple[float, float]]], title: str) -> "Figure":
    """Return the figure of `plot_scaling`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter, StrMethodFormatter

    figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.02)
    for (name, points), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
        add_curve(axes, points, colour, marker=marker, linewidth=2)
        add_text(axes, *points[-1], name, dy=-26, ha="right", color=colour)
    axes.set_title(title, loc="left", parse_math=False)
    axes.set_xlabel("accelerators", fontsize=12)
    axes.set_ylabel("throughput, relative to no communication", fontsize=12)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw(run_dirs: Sequence[Path]) -> "Figure":
    """Return the figure of one run folder, or of several together, where a fork is drawn from its fork on.

    Raises:
        UserError: a run is missing or damaged.
    """
    names = [run_dir.resolve().name for run_dir in run_dirs]
    if len(set(names)) < len(names):
        names = [str(run_dir) for run_dir in run_dirs]
    records = [read_record(run_dir) for run_dir in run_dirs]
    origins = [origin_of(run_dir) for run_dir in run_dirs]
    vocab_sizes = [_read_vocab_size(run_dir) for run_dir in run_dirs]
    if len(run_dirs) == 1:
        return draw_run(records[0], names[0], vocab_sizes[0], band_of_run(run_dirs[0]), origins[0])
    for i, origin in enumerate(origins):
        if origin:  # the past that it shares with its run would lie over that run's curve
            records[i] = [row for row in records[i] if row["step"] >= origin.step]
    return draw_comparison(records, names, comparable=len(set(vocab_sizes)) == 1)


def draw_run(
    rows: list[Row],
    name: str,
    vocab_size: int | None = None,
    band: Band | None = None,
    origin: Origin | None = None,
) -> "Figure":
    """Return the figure of one run: losses, landmarks, learning rate; of a fork where it began; its reference band if
    there is one.

    Without a vocabulary size the figure has no landmarks.
    """
    val = losses(rows, "val")
    train = thin_by_mean(losses(rows, "train"))
    lowest = best(rows)
    overfits = overfits_since(rows)
    end = _last_step([rows])
    figure, axes = make_canvas(plain(name, 50), _summary(rows, band), LOSS_LABEL, end)
    if band is not None:
        _add_band(axes, band, end)
    if overfits is not None:
        middle = (overfits + end) / 2
        add_text(axes, middle, 0.02, "overfitting", ha="center", color=GREY, xycoords=step_and_height(axes))
    if origin is not None:
        axes.axvline(origin.step, color=GREY, linewidth=1, linestyle=(0, (4, 2)), zorder=1)
        ha, dx = ("left", 4) if origin.step < end / 2 else ("right", -4)
        place = step_and_height(axes)
        add_text(axes, origin.step, 0.95, f"forked from {origin.run}", dx=dx, ha=ha, color=GREY, xycoords=place)
    add_curve(axes, train, TRAIN, linewidth=1.2)
    add_curve(axes, val, VAL, linewidth=2.4, marker="o")
    averaged = [(row["step"], row["val_loss_ema"]) for row in rows if row.get("val_loss_ema") is not None]
    if averaged:
        add_curve(axes, averaged, EMA, linewidth=1.6, marker="s")
    labels = []
    for curve, word, colour in ((val, "validation", VAL), (averaged, "average", EMA), (train, "training", TRAIN)):
        if curve:
            labels.append((curve[-1][1], f"{word} {format_loss(curve[-1][1])}", colour, ""))
    ends = [loss for loss, *_ in labels]

    landmarks = landmark_losses(vocab_size)
    values = [level for level, _ in landmarks] + [loss for _, loss in [*val, *averaged, *train]]
    set_height(axes, values, 1.5 * _start_level(landmarks, val or train))
    _add_landmarks(axes, landmarks, end, ends)
    if lowest is not None:
        label = f"best {format_loss(lowest['loss'])} at step {lowest['step']:,}"
        add_star(axes, lowest["step"], lowest["loss"], label)
    add_end_labels(axes, end, labels)
    losses_end_high = max(ends, default=0.0) > sum(axes.get_ylim()) / 2
    rate_axes = add_learning_rate(axes, rows, end, low=losses_end_high)
    if overfits is not None:
        # the axes of the losses lie over those of the rate: shading in them would hide the rate
        (rate_axes or axes).axvspan(overfits, end, **SHADING)
    return figure


def _start_level(landmarks: list[tuple[float, str]], curve: Points) -> float:
    """Return the loss at which a run starts: ln V if known, else its first recorded one."""
    if landmarks:
        return landmarks[0][0]
    return curve[0][1] if curve else 1.0


def _add_band(axes: "Axes", band: Band, end: int) -> None:
    """Draw the reference band up to the step `end`."""
    steps = []
    lower = []
    upper = []
    for step in band.steps:
        interval = band.at(step)
        if step <= end and interval is not None:
            steps.append(step)
            lower.append(interval[0])
            upper.append(interval[1])
    axes.fill_between(steps, lower, upper, facecolor=GREY, alpha=0.5, edgecolor=GREY, zorder=1)


def _add_landmarks(axes: "Axes", landmarks: list[tuple[float, str]], end: int, ends: list[float]) -> None:
    """Draw the landmarks as dotted lines. A label stands on the side away from the nearest of the curves' `ends`."""
    for level, name in landmarks:
        axes.axhline(level, color=GREY, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        nearest = min(ends, key=lambda loss: abs(loss - level), default=0.0)
        va, dy = ("top", -2) if nearest > level else ("bottom", 2)
        add_text(axes, end, level, f"{name} = {level:.2f}", dy=dy, ha="right", va=va, color=GREY)


def landmark_losses(vocab_size: int | None) -> list[tuple[float, str]]:
    """Return loss and name of each landmark, highest first.

    The list is empty if the vocabulary size is unknown, or 1: predicting the only token is no guess.
    """
    if vocab_size is None or vocab_size <= 1:
        return []
    return [(math.log(vocab_size) / divisor, name) for divisor, name in LANDMARKS]


def _summary(rows: list[Row], band: Band | None) -> str:
    """Return the result of a run in one line."""
    lowest = best(rows)
    if lowest is None:
        return "no evaluation yet"
    parts = [f"best validation loss {format_loss(lowest['loss'])} at step {lowest['step']:,}"]
    if lowest["bits_per_byte"] is not None:
        parts[0] += f" ({lowest['bits_per_byte']:.2f} bits per byte)"
    if "is_average" in lowest:
        parts[0] += " by the average"
    overfits = overfits_since(rows)
    if overfits is not None:
        parts.append(f"overfits since step {overfits:,}")
    verdict = band_verdict(rows, band)
    if verdict:
        parts.append(verdict.partition(":")[0])
    # a row that says from where on a run has other max_steps has no loss either
    not_finite = sum(row["loss"] is None and "max_steps" not in row for row in rows)
    if not_finite:
        parts.append(f"{not_finite:,} {'losses' if not_finite > 1 else 'loss'} not finite")
    return "; ".join(parts)


def draw_comparison(records: list[list[Row]], names: list[str], comparable: bool = True) -> "Figure":
    """Return the figure of several runs, each labelled with its name and lowest validation loss."""
    if comparable:
        subtitle = "solid: validation, dashed: training; labels: name and lowest validation loss"
    else:
        subtitle = "vocabularies differ, so these losses per token are not comparable"
    end = _last_step(records)
    figure, axes = make_canvas(f"{len(records)} runs", subtitle, LOSS_LABEL, end, right=0.65)
    points = []
    labels = []
    for number, (rows, name) in enumerate(zip(records, names, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        marker = MARKERS[number % len(MARKERS)]
        val = losses(rows, "val")
        train = thin_by_mean(losses(rows, "train"))
        lowest = best(rows)
        add_curve(axes, train, colour, linewidth=1, linestyle=(0, (4, 2)), alpha=0.8)
        add_curve(axes, val, colour, linewidth=2, marker=marker)
        if val or train:
            label = plain(name) if lowest is None else f"{plain(name)} {format_loss(lowest['loss'])}"
            labels.append(((val or train)[-1][1], label, colour, marker))
        points += [*val, *train]
    settled = [loss for step, loss in points if step >= end / 20]  # the first fall would flatten the rest
    set_height(axes, [loss for _, loss in points], max(settled, default=math.inf))
    add_end_labels(axes, end, labels)
    return figure


def draw_schedule(config: TrainConfig) -> "Figure":
    """Return the figure of the learning rate over the steps, with warm-up, peak and last value marked."""
    steps = config.max_steps
    warmup = config.warmup
    last = lr_at(steps, config)
    subtitle = f"{config.schedule}, {warmup:,} steps of warm-up ({100 * warmup / steps:.3g} % of {steps:,})"
    figure, axes = make_canvas("Learning rate over the steps", subtitle, "", steps)
    axes.set_ylim(0, config.max_lr * 1.25)
    axes.yaxis.set_major_formatter(lambda lr, _: f"{lr:.3g}")
    if warmup:
        axes.axvspan(0, warmup, **SHADING)
        ha, dx = ("left", 6) if warmup < steps / 2 else ("right", -6)
        add_text(axes, warmup, 0.03, "warm-up", dx=dx, ha=ha, color=GREY, xycoords=step_and_height(axes))
    drawn = sorted({steps * i // 500 for i in range(501)} | {warmup, decay_start(config)})
    axes.plot(drawn, [lr_at(step, config) for step in drawn], color=VAL, linewidth=2.4)
    add_star(axes, warmup, lr_at(warmup, config), f"peak {config.max_lr:.3g} at step {warmup:,}", dy=14)
    add_end_labels(axes, steps, [(last, f"end {last:.3g}", DARK, "")])
    return figure


def _last_step(records: Sequence[list[Row]]) -> int:
    """Return the last step of the records, at least 1, so that the axis has a width."""
    return max([row["step"] for rows in records for row in rows], default=0) or 1


def _read_vocab_size(run_dir: Path) -> int | None:
    path = run_dir / "config.toml"
    size = read_toml(str(path)).get("vocab_size") if path.exists() else None
    return size if isinstance(size, int) and size > 1 else None
