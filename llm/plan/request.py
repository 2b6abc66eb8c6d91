"""What is asked for by --time: the seconds, the settings that are given, and what cannot be combined with it.

This module does not import torch, so that a mistake is reported at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llm.config import GPTConfig, TrainConfig, from_settings, merged, parse_duration, resolve_settings
from llm.errors import UserError
from llm.plan import rule

DECIDED = ("max_steps", "max_time", "warmup_steps", "eval_every")  # a preset's own follow from its number of steps


@dataclass(frozen=True)
class Request:
    """A run for a given time. `config` is provisional where a setting is not in `given`."""

    config: TrainConfig
    given: dict[str, Any]  # settings that must not change
    seconds: float
    most_epochs: float = rule.MOST_EPOCHS  # passes over the text
    teachers: tuple[GPTConfig, ...] = ()  # the shapes of the models that the run learns from


def read_request(
    time: str, preset: dict[str, Any], typed: dict[str, Any], say: Callable[[str], None] = lambda line: None
) -> Request:
    """Return the request. `say` gets a line about what is ignored of the preset. Raises UserError."""
    seconds = parse_time(time)
    typed = resolve_settings(typed)
    check_typed(typed, seconds)
    ignored = [f"{name} = {preset[name]}" for name in DECIDED if preset.get(name) is not None and name not in typed]
    kept = {name: value for name, value in preset.items() if name not in DECIDED}
    settings, notices = merged(kept, typed)
    given = {name: value for name, value in settings.items() if value is not None}
    config = from_settings(rule.recipe(given))
    if ignored:
        notices.append(f"{', '.join(ignored)} of the preset is ignored: --time decides the steps")
    for notice in notices:
        say(notice)
    return Request(config, given, seconds)


def parse_time(text: str) -> float:
    """Return the seconds of --time. Raises UserError."""
    try:
        seconds = parse_duration(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise UserError(f"time = {text!r}: expected a duration such as 90, 10m or 2h")
    return seconds


def check_typed(typed: dict[str, Any], seconds: float) -> None:
    """Raise UserError for a typed setting that cannot be combined with --time."""
    if "max_steps" in typed:
        raise UserError(f"max_steps = {typed['max_steps']}: --time decides the steps; leave one of the two out")
    limit = typed.get("max_time")
    if limit is not None and limit < seconds:
        raise UserError(f"max_time = {limit:g} s: is below time = {seconds:g} s; leave --max_time out")
    if "-" in typed.get("text", ()):
        raise UserError("text = -: --time reads the text twice; write it to a file, and give the file's name")
