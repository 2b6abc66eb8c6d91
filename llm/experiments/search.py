"""Choose the settings of a try one after the other, by Optuna. Its storage, `optuna.log`, lies beside the runs.

Optuna's default sampler, TPE (Bergstra et al. 2011), draws the first 10 settings at random, and the next ones near
those that did well. A try that goes on finishes the settings that were asked for and not told.
"""

import statistics
from collections.abc import Callable
from typing import Any

from llm.config import FIELDS, coerce, field_type
from llm.errors import UserError
from llm.experiments.outcome import losses_at, read_runs
from llm.experiments.trials import Setting, Try, check_varied, make_setting

LOG = "optuna.log"
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
        import optuna.storages.journal
    except ModuleNotFoundError as error:
        raise UserError(f'--search needs {error.name}; pip install "losscurve[search]"') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(tried: Try) -> Any:
    """Return the Optuna study of a try, a new one or that in its folder."""
    optuna = import_optuna()
    tried.folder.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tried.folder / LOG)))
    study = optuna.create_study(storage=storage, study_name="try", load_if_exists=True)
    # a sampler draws the same numbers again after a restart if it has the same seed
    study.sampler = optuna.samplers.TPESampler(seed=(tried.seeds[0] + len(study.trials)) % 2**32)
    return study


def search(
    tried: Try, ranges: Ranges, choices: dict[str, list[Any]], count: int, train: Callable[[Setting], bool]
) -> bool:
    """Train settings that Optuna chooses until `count` have ended; return whether nothing interrupted it.

    `choices` are the settings that take one of several values. `train` returns whether it was not interrupted.
    """
    study = open_study(tried)
    while sum(trial.state.is_finished() for trial in study.trials) < count:
        number, changes = next_trial(study, ranges, choices)
        setting = make_setting(changes, f"{number:03d}-")
        if setting.name not in {known.name for known in tried.settings}:
            tried.settings.append(setting)
            tried.save()
        if not is_possible(tried, setting):
            tell(study, number, None)
        elif not train(setting):
            return False
        else:
            losses = losses_at(read_runs(tried), 1, len(tried.seeds)).get(setting.name)
            tell(study, number, None if setting.name in tried.stopped else losses)
    return True


def next_trial(study: Any, ranges: Ranges, choices: dict[str, list[Any]]) -> tuple[int, dict[str, Any]]:
    """Return number and changes of a trial that was asked for and not told, else of a new one."""
    names = ranges.keys() | choices.keys()
    for trial in study.trials:
        if not trial.state.is_finished() and trial.params.keys() == names:
            return int(trial.number), {name: trial.params[name] for name in (*ranges, *choices)}
        if not trial.state.is_finished():  # the program was killed while it asked
            tell(study, trial.number, None)
    asked = study.ask()
    changes = {}
    for name, (low, high) in ranges.items():
        suggest = asked.suggest_int if isinstance(low, int) else asked.suggest_float
        changes[name] = suggest(name, low, high, log=low > 0 and high / low >= LOGARITHMIC)
    return int(asked.number), changes | {name: asked.suggest_categorical(name, c) for name, c in choices.items()}


def is_possible(tried: Try, setting: Setting) -> bool:
    """Return whether the values of a setting can be combined; if not, `tried` says why."""
    try:
        tried.config(setting, tried.seeds[0])
    except UserError as error:
        tried.stopped[setting.name] = {"step": 0, "words": f"cannot be: {error}"}
        tried.save()
        return False
    return True


def tell(study: Any, number: int, losses: list[float] | None) -> None:
    """Tell Optuna the mean loss of a trial; None: it was stopped early, or cannot be."""
    from optuna.trial import TrialState

    if losses is None:
        study.tell(number, state=TrialState.PRUNED)
    else:
        study.tell(number, statistics.fmean(losses))
