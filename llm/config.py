"""Settings: every number of a run as a field with its unit, presets and TOML files, validation. No torch.

A setting has one name everywhere: the field here, the key in a TOML file, the flag on the command line
and the keyword of `llm.fit`.
"""

import dataclasses
import difflib
import glob
import json
import math
import os
import re
import reprlib
import sys
import tomllib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from llm import other_names
from llm.errors import UserError

PRESETS = ("chapter", "shakespeare-char", "shakespeare-char-cpu", "gpt2-124m")
# nanoGPT's names, where they mean the same
ALIASES = {
    "max_iters": "max_steps",
    "eval_interval": "eval_every",
    "log_interval": "log_every",
    "learning_rate": "max_lr",
    "warmup_iters": "warmup_steps",
}
PATHS = ("text", "data_dir", "out_dir", "init_from")
LIMITED = ("tinystories", "fineweb-edu")  # the texts of llm.hub, which have a text_limit
TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
NO_PATH = "that looks like a text, not a path; write it to a file and give the file's name"
FLOAT32 = (2.0**-126, 2.0**128 - 2.0**104)  # its smallest and largest number above 0
COUNTS = {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}


def setting(
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    unit: str = "",
) -> Any:
    """A documented field; `low <= value <= high` and `value > above` are checked by `validate`."""
    limits = {"low": low, "high": high, "above": above}
    return field(default=default, metadata={"help": help, "unit": unit, **limits})


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a `GPT`. The defaults are the chapter's: 13.67 M parameters."""

    vocab_size: int = setting(50257, "tokens in the vocabulary", low=1, high=2**31)
    block_size: int = setting(64, "context length, in tokens", low=1, high=2**20)
    n_layer: int = setting(4, "transformer blocks", low=1, high=1000)
    n_head: int = setting(4, "attention heads; divides n_embd", low=1, high=1000)
    n_embd: int = setting(128, "width of the residual stream", low=1, high=2**17)
    ffn_mult: int = setting(4, "width of the feed-forward layer, in units of n_embd", low=1, high=64)
    dropout: float = setting(0.0, "share of activations dropped in training", low=0.0, high=0.99)
    bias: bool = setting(False, "a bias in the attention linears (the feed-forward and norms have one)")
    tied_lm_head: bool = setting(False, "the output matrix is the token embedding, as in GPT-2")
    gelu: Literal["exact", "tanh"] = setting("exact", "exact GELU, or GPT-2's tanh approximation")

    def __post_init__(self) -> None:
        validate(self)
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_embd = {self.n_embd} is not divisible by n_head = {self.n_head}; "
                f"try --n_embd {math.ceil(self.n_embd / self.n_head) * self.n_head}"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training run. The defaults are the chapter's recipe.

    The model's own fields are those of `GPTConfig` and are set here by the same names;
    its `vocab_size` is then the tokenizer's, unless given.
    """

    text: tuple[str, ...] = setting(
        (),
        "what to train on: files, folders, - (standard input) or a name: shakespeare, tinystories, fineweb-edu",
    )
    text_limit: int | None = setting(
        None, "of tinystories or fineweb-edu, take this much (default: 200M)", low=1, unit="characters"
    )
    text_field: str | None = setting(None, "field or column of rows that holds the text (default: text)")
    tokenizer: Literal["auto", "gpt2", "bpe", "byte", "char"] = setting(
        "auto", "auto: gpt2 where its vocabulary can be had, else a bpe trained on the text"
    )
    vocab_size: int | None = setting(
        None, "tokens in the vocabulary (default: the tokenizer's; for bpe 4096)", low=1, high=2**31
    )
    val_fraction: float = setting(
        0.1, "share of the text's characters, at its end, kept for validation", above=0.0, high=0.9
    )
    data_dir: str | None = setting(None, "folder of train.bin and val.bin (default: data, or data/NAME for a --text)")
    out_dir: str = setting("checkpoints", "the run folder")

    model: GPTConfig = field(default_factory=GPTConfig)

    batch_size: int = setting(32, "windows in a micro-batch", low=1, high=2**20)
    gradient_accumulation_steps: int = setting(1, "micro-batches in a step", low=1, high=2**20)
    max_steps: int = setting(5000, "updates in the run, and the length of the schedule", low=1, high=10**9)
    max_time: float | None = setting(
        None,
        "stop after this long, the time before a resume included (90, 10m, 2h); the schedule is not bent",
        above=0.0,
        unit="duration",
    )
    eval_every: int = setting(250, "steps between evaluations", low=1)
    eval_tokens: int = setting(2**20, "validate on at most this many tokens, evenly spread", low=1)
    log_every: int = setting(10, "steps between training records in metrics.jsonl", low=1, high=10**6)
    save_every: int | float | None = setting(
        None,
        "steps between saved states, or with a unit the time: 500, 10m (default: as eval_every)",
        low=1,
        unit="steps or duration",
    )
    keep: int = setting(2, "newest saved states kept, besides the best", low=1)
    patience: int | None = setting(None, "stop after this many evaluations without improvement", low=1)

    warmup_steps: int | None = setting(None, "steps of linear warm-up from 0 (default: 2 % of max_steps)", low=0)
    max_lr: float = setting(3e-4, "peak learning rate", above=0.0, high=100.0)
    min_lr: float | None = setting(None, "final learning rate (default: max_lr / 10)", low=0.0, high=100.0)
    schedule: Literal["cosine", "linear", "constant"] = setting("cosine", "shape after the warm-up")
    beta1: float = setting(0.9, "AdamW: decay of the mean gradient", low=0.0, high=0.999999)
    beta2: float = setting(0.95, "AdamW: decay of the mean squared gradient", low=0.0, high=0.9999999)
    weight_decay: float = setting(0.01, "AdamW: weight decay", low=0.0, high=100.0)
    weight_decay_split: bool = setting(False, "leave norms, biases and embeddings out of weight decay")
    grad_clip: float = setting(0.0, "largest norm of the gradient; 0 is off", low=0.0)

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "precision of matrix products; auto: bfloat16 where it is fast, else float32"
    )
    device: str = setting("auto", "auto, cpu, mps, cuda or cuda:N")
    compile: bool = setting(False, "torch.compile the model")
    parallel: Literal["ddp", "fsdp"] = setting(
        "ddp", "how processes share the work: ddp, a whole model each; fsdp, shards of one model"
    )
    activation_checkpointing: bool = setting(False, "save memory: compute a block's activations again in backward")
    cpu_offload: bool = setting(False, "keep the shards of fsdp in the memory of the processor")
    seed: int = setting(1337, "decides initial weights, batches and dropout", low=0, high=2**63 - 1)
    init_from: str | None = setting(None, "start from the weights of a run folder or a .pt file")
    sample_prompt: str | None = setting(
        None, "prompt of the sample at each evaluation (default: ROMEO: or a line break)"
    )
    sample_tokens: int = setting(100, "tokens in the sample at each evaluation; 0 is off", low=0, high=10**5)

    def __post_init__(self) -> None:
        validate(self)
        if self.warmup >= self.max_steps:
            raise UserError(
                f"warmup_steps = {self.warmup} is not below max_steps = {self.max_steps}; lower it, or raise max_steps"
            )
        if self.final_lr > self.max_lr:
            raise UserError(f"min_lr = {self.min_lr} is above max_lr = {self.max_lr}; lower it, or raise max_lr")

    @property
    def warmup(self) -> int:
        """Steps of warm-up: as given, or 2 % of the steps (100 of the chapter's 5,000)."""
        return self.max_steps // 50 if self.warmup_steps is None else self.warmup_steps

    @property
    def final_lr(self) -> float:
        """Learning rate at the last step: as given, or the usual tenth of the peak."""
        # rounded, since 3e-4 / 10 is not 3e-5 in binary
        return float(f"{self.max_lr / 10:.12g}") if self.min_lr is None else self.min_lr

    @property
    def windows_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps

    def share(self, processes: int) -> tuple[int, int]:
        """(windows, micro-batches) that each of so many processes has of a step, which divides among them."""
        windows = self.windows_per_step // processes
        return windows, math.ceil(windows / self.batch_size)

    @property
    def tokens_per_step(self) -> int:
        return self.windows_per_step * self.model.block_size


MODEL_FIELDS = {f.name: f for f in dataclasses.fields(GPTConfig) if f.name != "vocab_size"}
TRAIN_FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig) if f.name != "model"}
FIELDS = TRAIN_FIELDS | MODEL_FIELDS  # every flag of `train`, by name


def field_type(f: dataclasses.Field[Any]) -> tuple[Any, bool]:
    """The type of a field without its `None`, and whether `None` is allowed."""
    options = get_args(f.type) if get_origin(f.type) in (typing.Union, types.UnionType) else (f.type,)
    kinds = [kind for kind in options if kind is not type(None)]
    return kinds[0], len(kinds) < len(options)


def parse_duration(text: str) -> float:
    """Seconds in '90', '45s', '10m', '1.5h' or '2d'. Raises ValueError on anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if not match:
        raise ValueError("give seconds, or a number with s, m, h or d, such as 10m")
    return float(match[1]) * UNITS[match[2] or "s"]


def coerce(name: str, value: Any) -> Any:
    """`value` (from a flag, a TOML file or Python) as the type of the field `name`, or UserError."""
    f = FIELDS[name]
    kind, optional = field_type(f)
    wrong = UserError(f"{name} = {shown(value)}: expected {describe(f)}")
    if value is None and optional:
        return None
    if name == "text":
        items = [value] if isinstance(value, (str, Path)) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(i, (str, Path)) for i in items):
            raise wrong
        return tuple(expanded(str(item)) for item in items)
    try:
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise wrong
            return value
        if kind is str:
            if not isinstance(value, (str, Path)):
                raise wrong
            return expanded(str(value)) if name in PATHS else str(value)
        if kind is bool:
            return value if isinstance(value, bool) else TRUTHS[value.lower()]
        if isinstance(value, bool):
            raise wrong
        if f.metadata["unit"] == "duration" and isinstance(value, str):
            return parse_duration(value)
        if f.metadata["unit"] == "steps or duration":  # an int is steps, a float seconds
            if isinstance(value, float):
                return value
            if isinstance(value, str) and value.strip()[-1:] in UNITS:
                return parse_duration(value)
        if f.metadata["unit"] == "characters" and isinstance(value, str) and value[-1:] in COUNTS:
            return int(float(value[:-1]) * COUNTS[value[-1]])
        if kind is int and isinstance(value, float) and value != int(value):
            raise wrong
        if kind is int and isinstance(value, str):
            return int(value.replace("_", "")) if re.fullmatch(r"[+-]?[\d_]+", value) else int_of_float(value)
        return kind(value)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        raise wrong from None


def expanded(path: str) -> str:
    """`path` with a leading ~ or ~name replaced by that home folder. Raises UserError where nobody knows it.

    A shell does this too, but not after `=`, in quotes, in a TOML file or in Python.
    """
    if not path.startswith("~"):
        return path
    found = os.path.expanduser(path) if os.environ.get("HOME") != "" else path  # an empty one would make ~/x be /x
    if found == path and not os.path.lexists(path):  # a file may be called ~x, and a pattern of the shell names it
        user = path.partition("/")[0]
        raise UserError(f"{shown(path)}: the home folder {user} is not known here; give the whole path")
    return found


def is_pattern(path: str) -> bool:
    """Whether `path` names no file, but stands for those that a shell would have put in its place."""
    return bool(re.search(r"[*?[]", path)) and not os.path.lexists(path)


def check_expanded(path: str) -> None:
    """Raises UserError for a pattern that matches something: no shell has expanded it."""
    if is_pattern(path) and (found := len(glob.glob(path))):
        raise UserError(
            f"{path}: is a pattern that no shell has expanded (it matches {found}); leave out its quotes, or give "
            "the names themselves"
        )


def shown(value: Any) -> str:
    """`value` as in Python, shortened: a file may hold a number of thousands of digits or tables without end."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 120
    try:
        return short.repr(value)
    except ValueError:  # Python spells no whole number beyond 4,300 digits
        return "a huge number"


def int_of_float(text: str) -> int:
    """'1e6' is a million; '1.5' is no integer (ValueError)."""
    number = float(text)
    if number != int(number):
        raise ValueError(text)
    return int(number)


def describe(f: dataclasses.Field[Any]) -> str:
    """What a field accepts, in words."""
    kind, _ = field_type(f)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if f.metadata["unit"] == "duration":
        return "a duration such as 90, 10m or 2h"
    if f.metadata["unit"] == "characters":
        return "a number of characters such as 50M or 2G"
    if f.metadata["unit"] == "steps or duration":
        return "a whole number of steps, or a duration such as 10m, at least 1 s"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text that is not empty"}.get(
        kind, "a list of paths"
    )
    low, high, above = (f.metadata[key] for key in ("low", "high", "above"))
    bounds = [
        f"at least {low}" if low is not None else "",
        f"above {above:g}" if above is not None else "",
        f"at most {high}" if high is not None else "",
    ]
    return f"{words} {' and '.join(b for b in bounds if b)}".strip()


def validate(config: Any) -> None:
    """Raises UserError naming the first field of a dataclass of settings that is out of its bounds."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name == "model" or (value is None and field_type(f)[1]):
            continue
        kind, _ = field_type(f)
        low, high, above = (f.metadata[key] for key in ("low", "high", "above"))
        if get_origin(kind) is Literal:
            good = value in get_args(kind)
        elif kind in (int, float):
            good = isinstance(value, (int, float)) and not isinstance(value, bool)
            good = good and abs(value) <= sys.float_info.max  # neither NaN nor infinite, nor a whole number beyond
            good = good and (isinstance(value, int) or kind is float or f.metadata["unit"] == "steps or duration")
            good = good and (low is None or value >= low) and (high is None or value <= high)
            good = good and (above is None or value > above)
        elif kind is bool:
            good = isinstance(value, bool)
        else:  # a text, or several
            words = (value,) if kind is str else value
            good = isinstance(words, tuple) and all(isinstance(word, str) and word for word in words)
            if good and re.search("[\ud800-\udfff]", "".join(words)):  # how Python holds bytes that are no UTF-8
                cure = "type it in a UTF-8 terminal" if f.name == "sample_prompt" else "give the file another name"
                raise UserError(f"{f.name} = {shown(value)}: not valid UTF-8; {cure}")
            if good and f.name in ("text", "data_dir", "out_dir", "init_from"):
                for word in words:
                    check_path(f.name, word)
        if not good:
            raise UserError(f"{f.name} = {shown(value)}: expected {describe(f)}")
        if kind is float and not f.metadata["unit"] and value and not FLOAT32[0] <= abs(value) <= FLOAT32[1]:
            end, limit = ("below", FLOAT32[0]) if abs(value) < 1 else ("above", FLOAT32[1])
            raise UserError(
                f"{f.name} = {shown(value)}: {end} {limit:.2g}, the end of float32, in which it is used; "
                f"give {'0 or a larger' if end == 'below' else 'a smaller'} number"
            )


def check_path(name: str, word: str) -> None:
    """Raises UserError for what no file system takes as a path: a text given in place of its file, usually."""
    longest = max(len(part.encode("utf-8", "surrogateescape")) for part in re.split(r"[/\\]", word))
    if longest > 255 or len(word) > 4000:
        raise UserError(f"{name} = {shown(word)}: {NO_PATH}")


def known_name(name: str) -> str:
    """The field that `name` (perhaps with hyphens, perhaps nanoGPT's) means, or UserError with ours or the nearest."""
    plain = name.replace("-", "_")
    plain = ALIASES.get(plain, plain)
    if plain not in FIELDS:
        raise UserError(f"unknown setting {shown(name)}{_hint(plain)}")
    return plain


def _hint(name: str) -> str:
    if found := other_names.ours(name, FIELDS):
        own, note = found
        return f"; here it is {own!r}" + (f" ({note})" if note else "")
    if found := other_names.ours(name, ("resume", "track", "nproc")):
        return f"; that is no setting but a flag: losscurve train --{found[0]} ({found[1] or 'see docs/scale.md'})"
    near = difflib.get_close_matches(name, [*FIELDS, *ALIASES], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def known_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` by the names and in the types of our fields. Raises UserError, also for one that is given twice."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        known = known_name(name)
        if known in values:
            raise UserError(f"{known} is given twice, by several of its names; give it once")
        values[known] = coerce(known, value)
    return values


def from_settings(settings: dict[str, Any], base: TrainConfig | None = None) -> TrainConfig:
    """`base` (the chapter's recipe if None) with flat `settings` laid over it, checked."""
    values = known_settings(settings)
    base = base or TrainConfig()
    ours = {name: value for name, value in values.items() if name in TRAIN_FIELDS}
    model = {name: value for name, value in values.items() if name in MODEL_FIELDS}
    if ours.get("vocab_size") is not None:
        model["vocab_size"] = ours["vocab_size"]
    return dataclasses.replace(base, model=dataclasses.replace(base.model, **model), **ours)


def over_preset(preset: dict[str, Any], given: dict[str, Any], say: Callable[[str], None]) -> TrainConfig:
    """The settings of a preset with those that a person gave over them, checked.

    A setting of the preset that one of the person's makes impossible is replaced by its default, and `say` gets a
    line about each. What the person gave is never changed. Raises UserError.
    """
    preset, given = known_settings(preset), known_settings(given)
    left_out: dict[str, list[str]] = {}  # settings by reason
    for name, instead, reason in _impossible(preset, given):
        left_out.setdefault(reason, []).append(f"{name} = {shown(preset[name])}")
        preset[name] = FIELDS[name].default if instead is None else instead
    config = from_settings(preset | given)
    for reason, settings in left_out.items():
        say(f"{', '.join(settings)} of the preset is left out: {reason}")
    return config


def _impossible(preset: dict[str, Any], given: dict[str, Any]) -> list[tuple[str, Any, str]]:
    """What of a preset cannot be with what a person gave: the setting, the value instead (None: its default), why."""
    found: list[tuple[str, Any, str]] = []
    both = preset | given

    def clash(name: str, reason: str, instead: Any = None) -> None:
        if preset.get(name) is not None and name not in given:
            found.append((name, instead, reason))

    steps, lr, width = (given.get(name) for name in ("max_steps", "max_lr", "n_embd"))
    if steps is not None and (both.get("warmup_steps") or 0) >= steps:
        clash("warmup_steps", f"it is not below max_steps = {steps}; the warm-up is {steps // 50} steps (2 %)")
    if lr is not None and (both.get("min_lr") or 0) > lr:
        clash("min_lr", f"it is above max_lr = {lr:g}; the learning rate ends at a tenth of that")
    heads = preset.get("n_head") or 1
    if width is not None and width > 0 and heads > 0 and width % heads:
        fitting = max(number for number in range(1, heads + 1) if width % number == 0)
        clash("n_head", f"it does not divide n_embd = {width}; n_head is {fitting}", fitting)
    if given.get("parallel") == "ddp" and both.get("cpu_offload"):
        clash("cpu_offload", "it works with parallel = 'fsdp' only")
    if given.get("parallel") == "fsdp" and both.get("compile"):
        clash("compile", "it does not work with parallel = 'fsdp'")
    if given.get("parallel") == "fsdp" and both.get("dtype") == "float16":
        clash("dtype", "it does not work with parallel = 'fsdp'; dtype is auto")
    text, tokenizer = (name in given and given[name] != preset.get(name) for name in ("text", "tokenizer"))
    if text and not set(given["text"]) & set(LIMITED):
        clash("text_limit", f"it is for {' and '.join(LIMITED)}, and text is another")
    if given.get("init_from") and given["init_from"] != preset.get("init_from"):
        for name in (*MODEL_FIELDS, "tokenizer", "vocab_size"):
            if name != "dropout":
                clash(name, "the weights of init_from decide it")
    elif tokenizer or (text and both.get("tokenizer") == "char"):
        clash("vocab_size", "it was that of another text or tokenizer")
    return found


def to_settings(config: TrainConfig) -> dict[str, Any]:
    """The flat settings of a config: `from_settings(to_settings(c)) == c`. Fields that are None are left out."""
    values = {name: getattr(config, name) for name in TRAIN_FIELDS}
    values |= {name: getattr(config.model, name) for name in MODEL_FIELDS}
    return {name: value for name, value in values.items() if value is not None}


def read_toml(source: str) -> dict[str, Any]:
    """The settings of a preset, by name, or of a TOML file, by path. Raises UserError naming what is wrong."""
    if source in PRESETS:
        text = resources.files("llm").joinpath("presets", f"{source}.toml").read_text(encoding="utf-8")
    else:
        source = expanded(source)
        if not source.endswith(".toml"):
            near = difflib.get_close_matches(source, PRESETS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PRESETS)}, or a .toml file"
            raise UserError(f"unknown preset {source!r}; {hint}")
        try:
            # Windows' editors begin it with a byte-order mark
            text = Path(source).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no path at all
            raise UserError(f"{source}: cannot be read ({error})") from None
    try:
        return known_settings(tomllib.loads(text))
    except (ValueError, RecursionError, UserError) as error:  # ValueError: not TOML, or a number too long
        raise UserError(f"{source}: {error}") from None


def write_toml(config: TrainConfig) -> str:
    """The config as TOML text that `read_toml` reads back."""

    def spelled(value: Any) -> str:
        if isinstance(value, tuple):
            return "[" + ", ".join(spelled(item) for item in value) + "]"
        if isinstance(value, str):
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        return str(value).lower() if isinstance(value, bool) else repr(value)

    return "".join(f"{name} = {spelled(value)}\n" for name, value in to_settings(config).items())
