"""Comparisons in words: what the settings are, the verdict on each, and the numbers beside it."""

from collections.abc import Sequence

from llm.config.differences import settings_apart
from llm.experiments.compare import Comparison, Finding, has_pairs
from llm.experiments.paired import Difference, verdict
from llm.experiments.recorded import REPEATED, Group
from llm.record.chart_style import plain

UNITS = {"loss": "nats per token", "bits_per_byte": "bits per byte"}
PAIRS = {"seed": "pairs", "part": "parts of the text"}
LEAST = 1e-9  # p-value that is printed
NAME_LENGTH = 100  # characters of a path or a value


def report_lines(settings: Sequence[Group], comparisons: Sequence[Comparison], looks: int = 1) -> list[str]:
    """Return all that is to be said of settings and their comparisons with the first one."""
    lines = setting_lines(settings)
    if not comparisons:
        return [*lines, spread_line(settings[0])]
    for comparison in comparisons:
        lines += ["", *comparison_lines(comparison)]
    closing = closing_lines(comparisons, looks)
    return [*lines, "", *closing] if closing else lines


def setting_lines(settings: Sequence[Group]) -> list[str]:
    """Return a line for each setting: its runs, their seeds, and what differs from the first setting."""
    lines = []
    for setting in settings:
        paths = ", ".join(plain(str(run.path), NAME_LENGTH) for run in setting.runs)
        line = f"{setting.name}: {paths} ({_seeds(setting.seeds)}{_forked(setting)})"
        lines.append(line if setting is settings[0] else f"{line}: {apart(settings[0], setting)}")
    return lines


def apart(base: Group, other: Group, in_short: bool = False) -> str:
    """Return how `other` differs from `base`: "max_lr 0.01 instead of 0.003", in short "max_lr 0.01"."""
    first, second = base.runs[0], other.runs[0]
    has_same_files = first.hashes == second.hashes
    ignored = REPEATED if has_same_files else REPEATED - {"text", "tokenizer"}
    words = [
        f"{name} {_value(ours)}" if in_short else f"{name} {_value(ours)} instead of {_value(theirs)}"
        for name, (ours, theirs) in settings_apart(second.config, first.config, ignored).items()
    ]
    what = "another past" if has_same_files else "other token files"
    return ", ".join(words) or (what if in_short else f"the same settings, {what}")


def _value(value: object) -> str:
    if value is None:
        return "none"
    return plain(" ".join(map(str, value)) if isinstance(value, tuple) else str(value), NAME_LENGTH)


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"


def _forked(setting: Group) -> str:
    if setting.forked_at is None:
        return ""
    runs = {run.origins[0].run for run in setting.runs if run.origins}
    return f"; forked from {', '.join(sorted(runs))} at step {setting.forked_at:,}"


def comparison_lines(comparison: Comparison) -> list[str]:
    """Return the verdicts on a setting, and the numbers beside each."""
    base, other = comparison.base, comparison.other
    title = f"{other.name} against {base.name}"
    if comparison.unit is None:
        return [f"{title}: not comparable", *(f"  {note}" for note in comparison.notes)]
    lines = [f"{title}, {_pairing(comparison)}"]
    for axis, finding in comparison.findings.items():
        where = f"at {finding.where}" if axis != "weights" else finding.where
        lines.append(f"  {where}: {finding_words(finding, UNITS[comparison.unit])}")
        if finding.difference.pairs > 1:
            lines.append(f"    ({numbers(finding.difference, finding.pair)})")
    return [*lines, *(f"  note: {note}" for note in comparison.notes)]


def finding_words(finding: Finding, unit: str) -> str:
    """Return the verdict on a finding with its unit."""
    words = verdict(finding.difference, finding.pair, unit)
    if finding.pair == "part" and finding.difference.is_real:
        words += "; that holds for these weights: another seed of the same setting may turn out otherwise"
    return words


def numbers(difference: Difference, pair: str) -> str:
    """Return the numbers of a difference, for a reader who knows statistics."""
    chance = f"p {difference.p_value:.2g}" if difference.p_value >= LEAST else f"p < {LEAST:g}"
    return (
        f"mean {difference.mean:+.4f}, standard error {difference.standard_error:.2g} over {difference.pairs} "
        f"{PAIRS[pair]}, "
        f"{difference.freedom} degree{'s' * (difference.freedom > 1)} of freedom, {chance}, "
        f"interval {100 * (1 - difference.level):.3g} %"
    )


def _pairing(comparison: Comparison) -> str:
    base, other = comparison.base, comparison.other
    if not has_pairs(base, other):
        return "without pairs (other seeds, so the spread of both counts in full)"
    count = len(set(base.seeds) & set(other.seeds))
    return f"in {count} pair{'s' * (count > 1)} of runs with the same seed"


def closing_lines(comparisons: Sequence[Comparison], looks: int = 1) -> list[str]:
    """Return what the brackets mean and for what they are corrected, if a verdict has any; and when to say --looks."""
    family = [found for found in comparisons if any(item.difference.pairs > 1 for item in found.findings.values())]
    findings = [finding for found in family for finding in found.findings.values()]
    lines = []
    if any(finding.difference.is_real for finding in findings):
        lines.append(
            "Brackets: the true difference is between these two values in 95 of 100 experiments. In the others, "
            "settings that do not differ may be called better or worse. Equal steps, tokens, seconds and weights are "
            "questions of their own, with 5 of 100 each."
        )
        if len(family) > 1:
            lines.append(
                f"{len(family)} settings are compared with {family[0].base.name}, so the brackets are wider (Holm's "
                "correction): the 5 of 100 are for all of them together, for each question."
            )
        if looks > 1:
            lines.append(
                f"{looks} looks at the same question: the brackets are wider, and the 5 of 100 are for all looks "
                "together."
            )
    if looks == 1 and any("would tell" in verdict(finding.difference, finding.pair) for finding in findings):
        lines.append(
            "More seeds after this are a second look at the same question, and with two looks 10 of 100 say better or "
            "worse by chance; --looks 2, each time, keeps it at 5."
        )
    return lines


def spread_line(setting: Group) -> str:
    """Return the losses of the runs of one setting where there is no other to compare with."""
    end = setting.end("step", "loss")
    if end is None:
        return f"{setting.name}: no evaluation after step 0 in all runs yet"
    losses = setting.losses("step", end, "loss")
    words = f"{setting.name}: validation loss {sum(losses) / len(losses):.4f} at step {end:,.0f}"
    if len(losses) > 1:
        words += f", {min(losses):.4f} to {max(losses):.4f} by seed"
    return f"{words}; one setting only, so there is nothing to compare it with"
