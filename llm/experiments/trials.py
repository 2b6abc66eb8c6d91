"""A try: settings to compare, each trained with the same seeds, in one folder. `try.json` there says what it is.

The settings of a try are combinations of values (`--vary`), or chosen one after the other (`--search`).
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm import storage
from llm.config import TrainConfig, coerce, over_preset
from llm.config.differences import folder_name, settings_apart
from llm.config.settings import resolve_name
from llm.errors import UserError

NAME = "try.json"
NAMED = 6  # differences that a message names
FIXED = {  # settings that cannot differ within a try, and why
    "seed": "is the same for all settings; give the number of seeds by --seeds",
    "out_dir": "is the folder of the whole try",
    "max_time": "would cut runs off in the middle of their schedule; give --time for all runs together",
    **dict.fromkeys(
        ("text", "text_limit", "text_field", "data_dir", "val_fraction", "tokenizer", "vocab_size", "eval_tokens"),
        "would make losses that do not compare; train one run each, and see losscurve compare",
    ),
}


@dataclass(frozen=True)
class Setting:
    """One of the settings of a try. Its runs are in the folder `name`, one for each seed."""

    name: str
    changes: dict[str, Any]  # by field name


@dataclass
class Try:
    """What a try consists of, and what was decided so far; `save` keeps it in `folder`."""

    folder: Path
    preset: dict[str, Any]  # settings of all runs that the changes of a setting may rule out
    given: dict[str, Any]  # settings of all runs
    seeds: list[int]
    settings: list[Setting]
    against: str = "best"  # what the others are compared with: "best", or "first": the first setting
    seconds: float | None = None  # of each run, with --time
    most_steps: int = 10**9  # of such a run: more would gain little
    asked: dict[str, Any] = field(default_factory=dict)  # what a later call must ask for too
    stopped: dict[str, dict[str, Any]] = field(default_factory=dict)  # by name: "step" and "words"
    judged: dict[str, float] = field(default_factory=dict)  # by name: the share of the steps where it last could stop

    def run_dir(self, setting: Setting, seed: int) -> Path:
        """Return the run folder of a setting and a seed."""
        return self.folder / setting.name / f"seed-{seed}"

    def config(self, setting: Setting, seed: int) -> TrainConfig:
        """Return the settings of a run. Raises UserError."""
        folders = {"seed": seed, "out_dir": self.run_dir(setting, seed)}
        return over_preset(self.preset, self.given | setting.changes | folders, lambda line: None)

    def has_begun(self) -> bool:
        """Whether any of its runs is there."""
        return any(
            (self.run_dir(setting, seed) / "config.toml").exists() for setting in self.settings for seed in self.seeds
        )

    def save(self) -> None:
        """Write try.json."""
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "folder"}
        storage.write_json(self.folder / NAME, facts | {"settings": [vars(setting) for setting in self.settings]})


def read_try(folder: Path) -> Try:
    """Return the try in `folder`. Raises UserError if there is none, or its try.json is damaged."""
    try:
        facts = dict(storage.read_json(folder / NAME))
        settings = [Setting(str(found["name"]), dict(found["changes"])) for found in facts.pop("settings")]
        return Try(folder=folder, settings=settings, **facts)
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{folder / NAME}: not what losscurve try writes ({error}); choose another folder") from None


def check_same(known: Try, asked: dict[str, Any]) -> None:
    """Raise UserError that names what differs between the try in a folder and what is `asked` for now."""
    asked = json.loads(json.dumps(asked, default=str))
    changes = next((setting.changes for setting in known.settings if setting.name not in known.stopped), {})
    now, before = (
        over_preset(one["preset"], one["given"] | changes, lambda line: None) for one in (asked, known.asked)
    )
    pairs = settings_apart(now, before)
    for name in sorted((asked.keys() | known.asked.keys()) - {"preset", "given"}):
        if asked.get(name) != known.asked.get(name):
            pairs[name] = (asked.get(name), known.asked.get(name))
    if pairs:
        words = [f"{name} was {_value(then)} and is {_value(ours)} now" for name, (ours, then) in pairs.items()]
        more = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
        raise UserError(
            f"{known.folder}: holds another try: {', '.join(words[:NAMED])}{more}; to go on with it give the same, "
            "otherwise choose another --out_dir"
        )


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return "not given" if value is None else str(value)


def parse_vary(words: Sequence[str], flag: str = "vary") -> dict[str, list[Any]]:
    """Return the values of each setting, of words such as "max_lr=1e-3,3e-3". Raises UserError."""
    found: dict[str, list[Any]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not equals or not all(values.split(",")):
            raise UserError(f"{flag} = {word!r}: expected a setting and its values, such as max_lr=1e-3,3e-3")
        own = check_varied(name, flag)
        if own in found:
            raise UserError(f"--{flag} {own}: given twice; give all its values at once")
        found[own] = [coerce(own, value) for value in values.split(",")]
        if len(set(found[own])) < len(found[own]):
            raise UserError(f"{flag} = {word!r}: the same value twice; leave one out")
    return found


def check_varied(name: str, flag: str) -> str:
    """Return the field that `name` stands for. Raises UserError if it cannot differ within a try."""
    own = resolve_name(name)
    if own in FIXED:
        raise UserError(f"--{flag} {own}: {FIXED[own]}")
    return own


def combinations(vary: dict[str, list[Any]]) -> list[Setting]:
    """Return the settings of all combinations, the first values first."""
    products = itertools.product(*vary.values())
    return [make_setting(dict(zip(vary, values, strict=True))) for values in products]


def make_setting(changes: dict[str, Any], prefix: str = "") -> Setting:
    """Return the setting, named by its changes."""
    return Setting(prefix + folder_name(changes), changes)
