"""The outcome of a try: the settings in order, each with its losses and the verdict about it."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from llm.config import TrainConfig, write_toml
from llm.experiments.paired import Difference, holm, looks_at_best, paired_difference, verdict
from llm.experiments.rounds import losses_at
from llm.experiments.trials import Setting, Try
from llm.record.metrics import best, read_record


@dataclass(frozen=True)
class Outcome:
    """What came out of one setting. Losses are the lowest validation losses of its runs, in nats per token."""

    setting: Setting
    losses: Sequence[float] = ()  # of each seed; () if the setting was stopped, or is not finished
    bits_per_byte: float | None = None  # mean over the seeds
    difference: Difference | None = None  # from the reference; None for the reference itself
    words: str = ""

    @property
    def mean(self) -> float | None:
        """The mean loss over the seeds."""
        return statistics.fmean(self.losses) if self.losses else None


def outcomes(tried: Try) -> list[Outcome]:
    """Return the outcome of each setting: the finished ones, best first, then the others in their order."""
    known = {name: losses for name, losses in losses_at(tried, 1).items() if name not in tried.stopped}
    ranked = sorted(known, key=lambda name: statistics.fmean(known[name]))
    by_name = {setting.name: setting for setting in tried.settings}
    reference = tried.settings[0].name if tried.against == "first" else next(iter(ranked), "")
    differences = differences_from(reference, known, tried.against) if reference in known else {}
    found = []
    for name in ranked:
        difference = differences.get(name)
        words = verdict(difference) if difference else f"the {tried.against}" if name == reference else "not compared"
        found.append(Outcome(by_name[name], known[name], _mean_bits(tried, by_name[name]), difference, words))
    for setting in tried.settings:
        if setting.name in tried.stopped:
            stop = tried.stopped[setting.name]
            found.append(Outcome(setting, words=f"stopped at step {stop['step']:,}: {stop['words']}"))
        elif setting.name not in known:
            found.append(Outcome(setting, words="not finished"))
    return found


def differences_from(reference: str, known: dict[str, list[float]], against: str) -> dict[str, Difference]:
    """Return the difference of each other setting from the reference, which is the "best" or the "first" of them."""
    others = [name for name in known if name != reference]
    looks = looks_at_best(len(known)) if against == "best" else 1
    found = holm([paired_difference(known[name], known[reference]) for name in others], looks)
    return dict(zip(others, found, strict=True))


def _mean_bits(tried: Try, setting: Setting) -> float | None:
    rows = [best(read_record(tried.run_dir(setting, seed))) for seed in tried.seeds]
    bits = [row["bits_per_byte"] for row in rows if row and row["bits_per_byte"] is not None]
    return statistics.fmean(bits) if len(bits) == len(rows) else None


def columns(tried: Try, found: Sequence[Outcome]) -> dict[str, list[str]]:
    """Return the cells of the table of a try, by title."""
    means = [outcome.mean for outcome in found]
    spreads = [statistics.stdev(outcome.losses) if len(outcome.losses) > 1 else None for outcome in found]
    return {
        "setting": [outcome.setting.name for outcome in found],
        "val loss": ["" if mean is None else f"{mean:.4f}" for mean in means],
        "± of a seed": ["" if spread is None else f"{spread:.4f}" for spread in spreads],
        "bits/byte": ["" if bits is None else f"{bits:.3f}" for bits in (outcome.bits_per_byte for outcome in found)],
        f"against the {tried.against}": [outcome.words for outcome in found],
    }


def best_config(tried: Try, found: Sequence[Outcome]) -> TrainConfig | None:
    """Return the settings of the best setting, for a run of its own; None if none is finished."""
    if not found or not found[0].losses:
        return None
    config = tried.config(found[0].setting, tried.seeds[0])
    return dataclasses.replace(config, out_dir=TrainConfig().out_dir)


def best_toml(tried: Try, found: Sequence[Outcome]) -> str | None:
    """Return the best setting as TOML, with the verdicts as comments; None if none is finished."""
    config = best_config(tried, found)
    if config is None:
        return None
    lines = [f"# {outcome.setting.name}: {outcome.words}" for outcome in found]
    return "\n".join(
        [f"# the best of {len(found)} settings, with {len(tried.seeds)} seeds each", *lines, write_toml(config)]
    )
