"""Choose the settings of a try one after the other, by Optuna.

Optuna's default sampler, TPE (Bergstra et al. 2011), draws the first 10 settings at random, and the next ones near
those that did well. A try that goes on tells it first what the settings so far have brought.
"""

import statistics
from collections.abc import Callable
from typing import Any

from llm.config import FIELDS, coerce, field_type
from llm.errors import UserError
from llm.experiments.outcome import losses_at, read_runs
from llm.experiments.trials import Setting, Try, check_varied, make_setting

LOGARITHMIC = 10  # a range whose ends differ by this factor or more is searched on a logarithmic scale

Ranges = dict[str, tuple[Any, Any]]  # lowest and highest value of each setting


def parse_ranges(words: list[str]) -> Ranges:
    """Return the ranges of words such as "max_lr=1e-4..1e-2". Raises UserError."""
    found: Ranges = {}
    for word in words:
        name, _, ends = word.partition("=")
        low, dots, high = ends.partition("..")
        if not dots or not low or not high:
            raise UserError(f"search = {word!r}: expected a setting and a range, such as max_lr=1e-4..1e-2")
        own = check_varied(name, "search")
        if field_type(FIELDS[own])[0] not in (int, float):
            raise UserError(f"--search {own}: is no number; give its values by --vary {own}=…")
        if own in found:
            raise UserError(f"--search {own}: given twice; give one range")
        found[own] = coerce(own, low), coerce(own, high)
        if not found[own][0] < found[own][1]:
            raise UserError(f"search = {word!r}: the first number must be below the second")
    return found


def import_optuna() -> Any:
    """Return the module. Raises UserError if it is missing."""
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise UserError(f'--search needs {error.name}; pip install "losscurve[search]"') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def search(
    tried: Try, ranges: Ranges, choices: dict[str, list[Any]], count: int, train: Callable[[Setting], bool]
) -> bool:
    """Train settings that Optuna chooses until there are `count`; return whether nothing interrupted it.

    `choices` are the settings that take one of several values. `train` returns whether it was not interrupted.
    """
    optuna = import_optuna()
    axes = {name: _axis(optuna, *ends) for name, ends in ranges.items()}
    axes |= {name: optuna.distributions.CategoricalDistribution(values) for name, values in choices.items()}
    # with the same seed, a sampler would draw the same numbers again after a restart
    seed = (tried.seeds[0] + len(tried.settings)) % 2**32
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    finished = losses_at(tried, read_runs(tried))
    for number in range(max(count, len(tried.settings))):
        is_known = number < len(tried.settings)
        if is_known:
            study.enqueue_trial(tried.settings[number].changes)
        trial = study.ask(axes)
        if not is_known:
            changes = {name: trial.params[name] for name in (*ranges, *choices)}
            tried.settings.append(make_setting(changes, f"{number:03d}-"))
            tried.save()
        setting = tried.settings[number]
        if setting.name not in finished and is_possible(tried, setting) and not train(setting):
            return False
        losses = finished.get(setting.name) or losses_at(tried, read_runs(tried)).get(setting.name)
        if losses is None:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, statistics.fmean(losses))
    return True


def _axis(optuna: Any, low: Any, high: Any) -> Any:
    """Return what Optuna calls the distribution of a range."""
    kinds = optuna.distributions
    kind = kinds.IntDistribution if isinstance(low, int) else kinds.FloatDistribution
    return kind(low, high, log=low > 0 and high / low >= LOGARITHMIC)


def is_possible(tried: Try, setting: Setting) -> bool:
    """Return whether the values of a setting can be combined; if not, `tried` says why."""
    try:
        tried.config(setting, tried.seeds[0])
    except UserError as error:
        tried.stopped[setting.name] = {"step": 0, "words": f"cannot be: {error}"}
        tried.save()
        return False
    return True
