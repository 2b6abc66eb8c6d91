"""Compare settings by their runs: whether they compare at all, how far apart they are, and what that says.

`llm/checks/compare_runs.py` is another question: whether two runs that should be equal are.
"""

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm.errors import UserError
from llm.evaluate import Evaluation
from llm.experiments.paired import Difference, holm, paired_difference, unpaired_difference
from llm.experiments.parts import part_evaluations
from llm.experiments.recorded import Axis, Group, RecordedRun, Unit, group_runs, read_run
from llm.storage.checkpoint import saved_steps

Say = Callable[[str], None]
EvaluateParts = Callable[[RecordedRun], list[Evaluation]]


@dataclass(frozen=True)
class Finding:
    """A difference of two settings, and where it was found."""

    where: str  # "step 600", "12.3 seconds", "the saved weights, on 111,539 validation tokens"
    difference: Difference
    pair: str = "seed"  # what a pair consists of: "seed", or "part" of the validation text


@dataclass(frozen=True)
class Comparison:
    """A setting compared with the first one. Below 0, the setting's loss is lower than the first one's."""

    base: Group
    other: Group
    unit: Unit | None  # None if their losses do not compare
    notes: Sequence[str]  # why not, or with which reservation
    findings: dict[str, Finding]  # by axis ("step", "tokens", "seconds"), and "weights"


def compare(
    paths: Sequence[Path],
    looks: int = 1,
    data_dir: str | None = None,
    with_weights: bool = True,
    say: Say = lambda line: None,
) -> tuple[list[Group], list[Comparison], list[str]]:
    """Return the settings of some runs, the comparison of each with the first one, and notes on runs left out.

    With several comparisons or `looks`, the intervals are wider: see `paired.holm`. `data_dir` is where the runs' token
    files are, if they have moved. Of one run each, the saved weights are evaluated too unless `with_weights` is false;
    `say` gets a line before each.

    Raises:
        UserError: a folder has no run, or a damaged one.
    """
    known: dict[Path, list[Evaluation]] = {}

    def evaluate_parts(run: RecordedRun) -> list[Evaluation]:
        if run.path not in known:
            say(f"evaluating {run.path / 'model.pt'}")
            known[run.path] = part_evaluations(run, data_dir)
        return known[run.path]

    settings, notes = group_runs([read_run(path, data_dir) for path in paths])
    base, *others = settings
    comparisons = [compare_pair(base, other, evaluate_parts if with_weights else None) for other in others]
    return settings, corrected(comparisons, looks), notes


def corrected(comparisons: Sequence[Comparison], looks: int = 1) -> list[Comparison]:
    """Return comparisons with the same setting, their intervals widened by `paired.holm`, axis by axis.

    One pair has no interval and so no false alarm: it does not widen those of others.
    """
    found = [dict(comparison.findings) for comparison in comparisons]
    for axis in ("step", "tokens", "seconds", "weights"):
        family = [findings for findings in found if axis in findings and findings[axis].difference.pairs > 1]
        wider = holm([findings[axis].difference for findings in family], looks)
        for findings, difference in zip(family, wider, strict=True):
            findings[axis] = dataclasses.replace(findings[axis], difference=difference)
    return [
        dataclasses.replace(comparison, findings=findings)
        for comparison, findings in zip(comparisons, found, strict=True)
    ]


def compare_pair(base: Group, other: Group, evaluate_parts: EvaluateParts | None = None) -> Comparison:
    """Return the comparison of two settings; of one run each, `evaluate_parts` evaluates the saved weights."""
    first, second = base.runs[0], other.runs[0]
    unit, notes = common_unit(first, second)
    if unit is None:
        return Comparison(base, other, None, notes, {})
    notes += _reservations(base, other)
    shared = shared_until(base, other)
    if (common_end(base, other, "step", unit) or 0) <= shared:
        return Comparison(base, other, unit, [*notes, f"no {unit} after step {shared:,} in both yet"], {})
    findings: dict[str, Finding] = {}
    for axis in _axes(base, other):
        end = common_end(base, other, axis, unit)
        if end is not None:
            findings[axis] = Finding(_where(axis, end, first), difference_at(base, other, axis, end, unit))
    if evaluate_parts is not None and len(base.runs) == len(other.runs) == 1:
        try:
            findings["weights"] = compare_weights(first, second, evaluate_parts)
        except UserError as error:
            notes.append(f"the saved weights are not compared: {error}")
    return Comparison(base, other, unit, notes, findings)


def common_unit(first: RecordedRun, second: RecordedRun) -> tuple[Unit | None, list[str]]:
    """Return the unit in which the losses of two runs compare, None if in none, and why or with which reservation."""
    if not first.validation_hashes or not second.validation_hashes:
        return None, ["no env.json says which validation text a run has"]
    unit: Unit = "loss"
    notes = []
    if first.validation_hashes != second.validation_hashes:
        if first.text is None or second.text is None:
            return None, ["other validation tokens; whether of the same text is unknown without their data folders"]
        if first.text.source != second.text.source:
            evaluate = f"losscurve evaluate {shlex.join([str(first.path), str(second.path)])} --text FILE"
            return None, [f"another text: losses on different texts do not compare; on one they do: {evaluate}"]
        unit = "bits_per_byte"
        notes.append("other tokens of the same text: only bits per byte compare")
    theirs, ours = ((run.config.model.block_size, run.config.eval_tokens) for run in (first, second))
    if (theirs != ours or unit != "loss") and not (first.evaluates_all and second.evaluates_all):
        if theirs != ours:
            words = f"block_size {theirs[0]:,} and {ours[0]:,}, eval_tokens {theirs[1]:,} and {ours[1]:,}"
            return None, [f"another evaluation ({words}), on other parts of the validation text"]
        return None, ["an evaluation covers a part of the validation text only, another one in each"]
    if theirs[0] != ours[0]:
        notes.append(f"a prediction sees up to {theirs[0]:,} tokens before it in one, {ours[0]:,} in the other")
    return unit, notes


def has_pairs(base: Group, other: Group) -> bool:
    """Whether two settings have pairs: all seeds of one are among those of the other."""
    ours, theirs = set(other.seeds), set(base.seeds)
    return ours <= theirs or theirs <= ours


def difference_at(base: Group, other: Group, axis: Axis, place: float, unit: Unit) -> Difference:
    """Return the difference of two settings at a place on an axis, over pairs with the same seed if there are pairs."""
    if not has_pairs(base, other):
        return unpaired_difference(other.losses(axis, place, unit), base.losses(axis, place, unit))
    theirs = dict(zip(base.seeds, base.losses(axis, place, unit), strict=True))
    ours = dict(zip(other.seeds, other.losses(axis, place, unit), strict=True))
    shared = [seed for seed in theirs if seed in ours]
    return paired_difference([ours[seed] for seed in shared], [theirs[seed] for seed in shared])


def shared_until(base: Group, other: Group) -> int:
    """Return the step up to which the runs of all pairs are one, because they are forks; else 0."""
    if not has_pairs(base, other):
        return 0
    theirs = {run.config.seed: run for run in base.runs}
    steps = [run.shared_with(theirs[run.config.seed]) for run in other.runs if run.config.seed in theirs]
    return min(steps, default=0)


def common_end(base: Group, other: Group, axis: Axis, unit: Unit) -> float | None:
    """Return the last place on an axis that all runs have reached; None before an evaluation after step 0."""
    ends = [setting.end(axis, unit) for setting in (base, other)]
    return None if None in ends else min(end for end in ends if end is not None)


def difference_curve(base: Group, other: Group, axis: Axis, unit: Unit) -> list[tuple[float, Difference]]:
    """Return (place, difference) at each evaluation of the first run of `base` that all runs have reached.

    Where the runs of all pairs are one up to a step, the curve starts there.
    """
    end = common_end(base, other, axis, unit)
    runs = [*base.runs, *other.runs]
    if end is None:
        return []
    start = max(run.points(axis, unit)[0][0] for run in runs)
    curve = base.runs[0].points(axis, unit, shared_until(base, other))
    return [(place, difference_at(base, other, axis, place, unit)) for place, _ in curve if start <= place <= end]


def compare_weights(first: RecordedRun, second: RecordedRun, evaluate_parts: EvaluateParts) -> Finding:
    """Return the difference of the saved weights of two runs over the parts of the validation text.

    Raises:
        UserError: there are no weights yet, or the runs have other tokens or windows, so that no parts are common.
    """
    if first.validation_hashes != second.validation_hashes:
        raise UserError("their tokens differ")
    if first.config.model.block_size != second.config.model.block_size:
        raise UserError("their block_size differs")
    ours, theirs = evaluate_parts(second), evaluate_parts(first)
    tokens = sum(part.tokens for part in ours)
    difference = paired_difference([part.loss for part in ours], [part.loss for part in theirs])
    whose = "the saved weights"
    steps = [max(saved_steps(run.path), default=None) for run in (first, second)]
    if steps[0] != steps[1] and None not in steps:
        whose += f" (of step {steps[1]:,} against step {steps[0]:,})"
    return Finding(f"{whose}, on {tokens:,} validation tokens", difference, "part")


def _axes(base: Group, other: Group) -> list[Axis]:
    """Return the axes that tell something: tokens if a step has other tokens, seconds if all ran on one machine."""
    axes: list[Axis] = ["step"]
    if base.runs[0].config.tokens_per_step != other.runs[0].config.tokens_per_step:
        axes.append("tokens")
    if _share_machine(base, other):
        axes.append("seconds")
    return axes


def _share_machine(base: Group, other: Group) -> bool:
    return all(run.machine == base.runs[0].machine for run in (*base.runs, *other.runs))


def _where(axis: Axis, end: float, run: RecordedRun) -> str:
    if axis == "step":
        return f"step {end:,.0f}"
    if axis == "tokens":
        return f"{end:,.0f} tokens"
    return f"{end:,.1f} seconds of training" if end >= 1 else f"{end:.2g} seconds of training"


def _reservations(base: Group, other: Group) -> list[str]:
    """Return what a reader has to know beside the verdict."""
    first, second = base.runs[0], other.runs[0]
    notes = []
    if shared := shared_until(base, other):
        notes.append(_fork_words(base, other, shared))
    if not _share_machine(base, other):
        notes.append("the machines differ or are not recorded, so equal seconds are not compared")
    steps = first.config.max_steps, second.config.max_steps
    if steps[0] != steps[1] and {first.config.schedule, second.config.schedule} != {"constant"}:
        words = f"{base.name} has {steps[0]:,} steps and {other.name} {steps[1]:,}"
        notes.append(f"{words}: at equal steps the learning rate of one is further down its schedule")
    for setting in (base, other):
        for run in setting.runs:
            if run.not_finite is not None:
                notes.append(f"{run.path}: its validation loss is not finite at step {run.not_finite:,}")
    left = sorted(set(base.seeds) ^ set(other.seeds))
    if has_pairs(base, other) and left:
        notes.append(f"without a pair, and left out: seed {', '.join(map(str, left))}")
    return notes


def _fork_words(base: Group, other: Group, shared: int) -> str:
    """Return which of two settings is a fork of the other, if their runs are one up to the step `shared`."""
    same = f"up to step {shared:,} they are the same run"
    for fork, run in ((other, base), (base, other)):
        if run.forked_at is None or run.forked_at < shared:
            way = "a fork" if fork.forked_at == shared else "a fork of a fork"
            return f"{fork.name} is {way} of {run.name}: {same}"
    return f"{base.name} and {other.name} are forks of one run: {same}"
