"""A preset, and the user's settings over it: what they rule out of the preset is ignored, with a line."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llm.config.fields import short_repr
from llm.config.recipe import FIELDS, MODEL_FIELDS, MUON_SETTINGS, TrainConfig
from llm.config.settings import TEXTS_WITH_LIMIT, from_settings, resolve_settings


@dataclass(frozen=True)
class _Conflict:
    """A setting of a preset that is impossible with the user's settings."""

    name: str
    reason: str
    replacement: Any = None  # None: the default


def over_preset(
    preset: dict[str, Any], given: dict[str, Any], say: Callable[[str], None], source: str = "the preset"
) -> TrainConfig:
    """Return the config of a preset with the user's settings `given` replaced in it.

    A setting of the preset that is impossible with the user's settings is replaced by its default, and `say` gets a
    line about it, in which `source` names the preset. The user's own settings never change. Raises UserError.
    """
    settings, notices = merged(preset, given, source)
    config = from_settings(settings)
    for notice in notices:
        say(notice)
    return config


def merged(
    preset: dict[str, Any], given: dict[str, Any], source: str = "the preset"
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of `over_preset` by name, and its lines. Raises UserError."""
    preset = resolve_settings(preset)
    given = resolve_settings(given)
    ignored: dict[str, list[str]] = {}  # settings of the preset, by reason
    for conflict in list(_conflicts(preset, given)):
        name = conflict.name
        ignored.setdefault(conflict.reason, []).append(f"{name} = {short_repr(preset[name])}")
        preset[name] = FIELDS[name].default if conflict.replacement is None else conflict.replacement
    notices = [f"{', '.join(settings)} of {source} is ignored: {reason}" for reason, settings in ignored.items()]
    return preset | given, notices


def given_names(preset: dict[str, Any], given: dict[str, Any]) -> set[str]:
    """Return the names of the settings that a preset and the user give, without those that `merged` ignores."""
    settings, _ = merged(preset, given)
    wanted = resolve_settings(preset) | resolve_settings(given)
    return {name for name, value in settings.items() if value is not None and value == wanted[name]}


def _conflicts(preset: dict[str, Any], given: dict[str, Any]) -> Iterator[_Conflict]:
    """Yield the conflicts of the settings that the preset sets and the user does not."""
    finders = (
        *(_arch_conflicts, _optimizer_conflicts, _schedule_conflicts, _width_conflicts),
        *(_parallel_conflicts, _text_conflicts),
    )
    for find in finders:
        for conflict in find(preset, given):
            if preset.get(conflict.name) is not None and conflict.name not in given:
                yield conflict


def _arch_conflicts(preset: dict[str, Any], given: dict[str, Any]) -> Iterator[_Conflict]:
    arch = (preset | given).get("arch", FIELDS["arch"].default)
    for name, f in MODEL_FIELDS.items():
        if f.metadata["arch"] not in ("", arch):
            yield _Conflict(name, f"arch {arch} has none")


def _schedule_conflicts(preset: dict[str, Any], given: dict[str, Any]) -> Iterator[_Conflict]:
    both = preset | given
    steps = given.get("max_steps")
    if steps is not None and (both.get("warmup_steps") or 0) >= steps:
        reason = f"it is not below max_steps = {steps}; the warm-up is {steps // 50} steps (2 %)"
        yield _Conflict("warmup_steps", reason)
    lr = given.get("max_lr")
    if lr is not None and (both.get("min_lr") or 0) > lr:
        yield _Conflict("min_lr", f"it is above max_lr = {lr:g}; the final learning rate is a tenth of max_lr")
    schedule = given.get("schedule")
    if schedule not in (None, "wsd"):
        yield _Conflict("decay_fraction", f"it works with schedule = 'wsd' only, and schedule is {schedule!r}")


def _optimizer_conflicts(preset: dict[str, Any], given: dict[str, Any]) -> Iterator[_Conflict]:
    if given.get("optimizer") == "adamw":
        for name in MUON_SETTINGS:
            yield _Conflict(name, "it applies to optimizer = 'muon' only")


def _width_conflicts(preset: dict[str, Any], given: dict[str, Any]) -> Iterator[_Conflict]:
    width = given.get("n_embd")
    heads = preset.get("n_head") or 1
    if width is None or width <= 0 or heads <= 0 or width % heads == 0:
        return
    divisor = max(number for number in range(1, heads + 1) if width % number == 0)
    yield _Conflict("n_head", f"it does not divide n_embd = {width}; n_head is {divisor}", divisor)


def _parallel_conflicts(preset: dict[str, Any], given: dict[str, Any]) -> Iterator[_Conflict]:
    both = preset | given
    if given.get("parallel") == "ddp" and both.get("cpu_offload"):
        yield _Conflict("cpu_offload", "it works with parallel = 'fsdp' only")
    if given.get("parallel") == "fsdp" and both.get("compile"):
        yield _Conflict("compile", "it does not work with parallel = 'fsdp'")
    if given.get("parallel") == "fsdp" and both.get("dtype") == "float16":
        yield _Conflict("dtype", "it does not work with parallel = 'fsdp'; dtype is auto")


def _text_conflicts(preset: dict[str, Any], given: dict[str, Any]) -> Iterator[_Conflict]:
    """Yield the conflicts with another text, tokenizer or model to start from."""

    def is_changed(name: str) -> bool:
        return name in given and given[name] != preset.get(name)

    if is_changed("text") and not set(given["text"]) & set(TEXTS_WITH_LIMIT):
        yield _Conflict("text_limit", f"it applies to {' and '.join(TEXTS_WITH_LIMIT)} only, and text is another")
    if given.get("init_from") and is_changed("init_from"):
        for name in (*MODEL_FIELDS, "tokenizer", "vocab_size"):
            if name != "dropout":
                yield _Conflict(name, "the weights of init_from determine it")
    elif is_changed("tokenizer") or (is_changed("text") and (preset | given).get("tokenizer") == "char"):
        yield _Conflict("vocab_size", "it was that of another text or tokenizer")
