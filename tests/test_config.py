"""Settings against the chapter's and nanoGPT's published numbers, and TOML against the standard library's reader."""

import contextlib
import dataclasses
import math
import subprocess
import sys
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.config import (
    FIELDS,
    PRESETS,
    TEXTS_WITH_LIMIT,
    GPTConfig,
    TrainConfig,
    coerce,
    from_settings,
    over_preset,
    parse_duration,
    read_toml,
    to_settings,
    write_toml,
)
from llm.errors import UserError
from llm.text.hub import TEXTS

CHAPTER = {
    **{"vocab_size": 50257, "block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128, "ffn_mult": 4},
    **{"dropout": 0.0, "bias": False, "tied_lm_head": False, "gelu": "exact"},
}
OF_A_LLAMA = {
    "n_kv_head": None,
    "ffn_dim": None,
    "rope_theta": 1e4,
    "qk_norm": True,
    "head_dim": None,
    "norm_eps": 1e-6,
}
RECIPE = {
    **{"batch_size": 32, "gradient_accumulation_steps": 1, "max_steps": 5000, "eval_every": 250, "warmup": 100},
    **{"max_lr": 3e-4, "final_lr": 3e-5, "schedule": "cosine", "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.01},
    **{"weight_decay_split": False, "grad_clip": 0.0, "out_dir": "checkpoints", "max_time": None, "patience": None},
    **{"windows_per_step": 32, "tokens_per_step": 2048},
}
# nanoGPT's config/train_shakespeare_char.py, the CPU command of its README, and config/train_gpt2.py
CHAR = {
    **{"text": ("shakespeare",), "tokenizer": "char", "block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384},
    **{"dropout": 0.2, "batch_size": 64, "max_steps": 5000, "eval_every": 250, "warmup": 100, "max_lr": 1e-3},
    **{"final_lr": 1e-4, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "weight_decay_split": True},
    **{"grad_clip": 1.0, "bias": False, "tied_lm_head": True, "gradient_accumulation_steps": 1, "gelu": "exact"},
}
CHAR_CPU = CHAR | {
    **{"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.0, "batch_size": 12},
    **{"max_steps": 2000, "eval_every": 500},  # of the whole split, half as often as published
}
GPT2 = {
    **{"block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "bias": True, "tied_lm_head": True},
    **{"gelu": "tanh", "dropout": 0.0, "batch_size": 12, "tokens_per_step": 12 * 1024 * 40, "max_steps": 600_000},
    **{"eval_every": 1000, "warmup": 2000, "max_lr": 6e-4, "final_lr": 6e-5, "beta2": 0.95, "weight_decay": 0.1},
    **{"weight_decay_split": True, "grad_clip": 1.0, "vocab_size": None},
}


def value_of(config, name):
    return getattr(config if hasattr(config, name) else config.model, name)


def refused(**values):
    with pytest.raises(UserError) as caught:
        from_settings(values)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)


def test_the_model_of_no_arguments_is_the_chapters():
    assert dataclasses.asdict(GPTConfig()) == CHAPTER | OF_A_LLAMA | {"arch": "gpt2"}


@pytest.mark.parametrize(("name", "expected"), RECIPE.items())
def test_the_recipe_of_no_arguments_is_the_chapters(name, expected):
    assert getattr(TrainConfig(), name) == expected
    assert TrainConfig() == from_settings({})


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("chapter", {k: v for k, v in (CHAPTER | RECIPE).items() if k != "vocab_size"}),
        ("shakespeare-char", CHAR),
        ("shakespeare-char-cpu", CHAR_CPU),
        ("gpt2-124m", GPT2),
    ],
)
def test_a_preset_is_what_was_published(preset, expected):
    config = from_settings(read_toml(preset))
    assert {name: value_of(config, name) for name in expected} == expected


def test_the_presets_are_these_four():
    assert set(PRESETS) == {"chapter", "shakespeare-char", "shakespeare-char-cpu", "gpt2-124m"}
    folders = [from_settings(read_toml(preset)).out_dir for preset in PRESETS]
    assert len(set(folders)) == len(PRESETS)  # no preset writes into the run folder of another


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("max_iters", "max_steps"),
        ("eval_interval", "eval_every"),
        ("log_interval", "log_every"),
        ("learning_rate", "max_lr"),
        ("warmup_iters", "warmup_steps"),
        ("gradient_accumulation_steps", "gradient_accumulation_steps"),
        ("n-layer", "n_layer"),
    ],
)
def test_nanogpts_names_and_hyphens(theirs, ours):
    value = 0.5 if ours == "max_lr" else 3
    assert value_of(from_settings({theirs: value}), ours) == value


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("n_layers", "n_layer"),
        ("max_step", "max_steps"),
        ("learning_rat", "learning_rate"),
        ("max-iter", "max_iters"),
        ("droput", "dropout"),
        ("Batch_Size", "batch_size"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name, near):
    assert refused(**{name: 1}) == f"unknown setting {name!r}; did you mean {near!r}?"


def test_a_name_near_to_nothing():
    assert refused(zzzzqqq=1) == "unknown setting 'zzzzqqq'"
    assert "model" in refused(model=1)  # a field of the dataclass, but not a setting


HUGE = pytest.param(10**400, id="huge")
NUMBERS = [name for name, f in FIELDS.items() if f.type in (int, float, int | None, float | None)]
WHOLE = [name for name in NUMBERS if FIELDS[name].type in (int, int | None)]
ZERO = {
    "warmup_steps": {"max_steps": 10},
    "muon_momentum": {"optimizer": "muon"},
    **{name: {} for name in ("dropout", "min_lr", "beta1", "beta2", "weight_decay")},
    **{name: {} for name in ("grad_clip", "ema", "seed", "sample_tokens")},
}


def test_the_fields_under_test_are_the_fields():
    assert {"batch_size", "max_lr", "n_embd", "dropout", "max_time", "seed", "patience", "vocab_size"} <= set(NUMBERS)
    assert len(NUMBERS) == 37


@pytest.mark.parametrize(
    "value", [-1, math.nan, math.inf, -math.inf, "nan", "inf", True, False, "many", "", [1], {}, HUGE]
)
def test_values_that_are_not_numbers(value):
    for name in NUMBERS:
        assert refused(**{name: value}).startswith(f"{name} = ")


def test_zero_is_accepted_only_where_it_has_a_meaning():
    for name in NUMBERS:
        if name in ZERO:
            assert value_of(from_settings({name: 0} | ZERO[name]), name) == 0
        else:
            assert refused(**{name: 0}).startswith(f"{name} = 0")


@pytest.mark.parametrize("value", [1.5, "1.5", "0x10"])
def test_a_fraction_is_not_a_whole_number(value):
    for name in WHOLE:
        assert refused(**{name: value}).startswith(f"{name} = ")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 0, True, "3", 1.5, HUGE])
def test_the_dataclasses_check_themselves(value):
    with pytest.raises(UserError, match="batch_size = "):
        TrainConfig(batch_size=value)
    with pytest.raises(UserError, match="n_layer = "):
        GPTConfig(n_layer=value)


@pytest.mark.parametrize("name", ["max_lr", "max_time", "grad_clip"])
@pytest.mark.parametrize("value", [math.nan, math.inf, "1", True, HUGE])
def test_the_dataclass_checks_its_rates(name, value):
    with pytest.raises(UserError, match=f"{name} = "):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dropout", 1.0),
        ("beta1", 1.0),
        ("beta2", 1.0),
        ("val_fraction", 0.95),
        ("seed", 2**63),
        ("schedule", "cosin"),
        ("dtype", "fp32"),
        ("gelu", None),
        ("tokenizer", 3),
        ("compile", "maybe"),
        ("bias", 1),
        ("out_dir", 3),
        ("device", None),
        ("text", 3),
        ("text", [1]),
        ("text", [["a"]]),
        ("init_from", ["a"]),
    ],
)
def test_values_out_of_range(name, value):
    assert refused(**{name: value}).startswith(f"{name} = ")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_steps", "5_000", 5000),
        ("max_steps", "1e6", 10**6),
        ("max_steps", 2000.0, 2000),
        ("max_lr", "3e-4", 3e-4),
        ("max_lr", 1, 1.0),
        ("bias", "true", True),
        ("bias", "No", False),
        ("text", "a.txt", ("a.txt",)),
        ("text", ["a", "b"], ("a", "b")),
        ("patience", None, None),
        ("max_time", "10m", 600.0),
        ("max_time", 90, 90.0),
        ("seed", 2**63 - 1, 2**63 - 1),
    ],
)
def test_values_as_text(name, value, expected):
    found = coerce(name, value)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("45s", 45), ("10m", 600), ("1.5h", 5400), ("2d", 172800), (" 5m ", 300)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "m", "-5", "1h30m", "10 m", "1e3", "nan", "inf", "10M", "5.", "0", "0m", "9" * 400]
)
def test_texts_that_are_not_durations(text):
    assert refused(max_time=text).startswith(f"max_time = {'0.0' if text in ('0', '0m') else ''}")


def test_heads_divide_the_width():
    assert refused(n_embd=100, n_head=3) == "n_embd = 100 is not divisible by n_head = 3; try --n_embd 102"
    assert from_settings({"n_embd": 102, "n_head": 3}).model.n_embd == 102


def test_warm_up_and_learning_rates_must_fit_the_run():
    assert "warmup_steps = 10 is not below max_steps = 10" in refused(warmup_steps=10, max_steps=10)
    assert from_settings({"warmup_steps": 9, "max_steps": 10}).warmup == 9
    assert "min_lr = 0.002 is above max_lr = 0.001" in refused(min_lr=2e-3, max_lr=1e-3)
    assert from_settings({"min_lr": 1e-3, "max_lr": 1e-3}).final_lr == 1e-3
    assert [from_settings({"max_steps": n}).warmup for n in (1, 49, 50, 5000)] == [0, 0, 1, 100]


def test_later_settings_override_earlier_ones():
    base = from_settings(read_toml("shakespeare-char"))
    config = from_settings({"n_layer": 2, "max_steps": 7, "warmup_steps": 1}, base)
    assert (config.model.n_layer, config.model.n_head, config.max_steps, config.beta2) == (2, 6, 7, 0.99)
    assert from_settings({"vocab_size": 65}).model.vocab_size == 65


UNICODE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
PATH = UNICODE.filter(lambda text: not text.startswith("~"))  # a home folder
RATE = st.floats(1e-12, 1.0)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "text": st.lists(PATH, max_size=3).map(tuple),
        "out_dir": PATH,
        "data_dir": PATH,
        "sample_prompt": UNICODE,
        "device": UNICODE,
        "tokenizer": st.sampled_from(["auto", "gpt2", "bpe", "byte", "char"]),
        "vocab_size": st.integers(1, 2**31),
        "max_time": st.floats(1e-3, 1e15),
        "max_steps": st.integers(1, 10**9),
        "warmup_steps": st.just(0),
        "seed": st.integers(0, 2**63 - 1),
        "max_lr": RATE,
        "min_lr": st.just(0.0),
        "dropout": st.just(0.0) | st.floats(1e-30, 0.99),
        "grad_clip": st.just(0.0) | st.floats(1e-30, 1e30),
        "bias": st.booleans(),
        "compile": st.booleans(),
        "n_embd": st.integers(1, 1000).map(lambda n: 4 * n),
    },
)


@settings(max_examples=60, deadline=None)
@given(SETTINGS)
def test_a_config_survives_its_toml_file(tmp_path_factory, values):
    config = from_settings(values)
    assert {name: value_of(config, name) for name in values} == values
    assert from_settings(to_settings(config)) == config
    text = write_toml(config)
    assert tomllib.loads(text) == {k: list(v) if k == "text" else v for k, v in to_settings(config).items()}
    path = tmp_path_factory.getbasetemp() / "config.toml"
    path.write_bytes(text.encode("utf-8"))
    assert from_settings(read_toml(str(path))) == config


AWKWARD = [
    'a"b\\c',
    "'''",
    '"""',
    "\x00\x01\x08\t\n\f\r\x1b\x1f",
    "\x7f\x80\x85",
    "\u2028\ufeff\uffff",
    "🙂",
    "[x]\n# y",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_strings_survive(tmp_path, text):
    config = from_settings({"out_dir": text, "text": [text, text]})
    (tmp_path / "c.toml").write_bytes(write_toml(config).encode("utf-8"))
    assert from_settings(read_toml(str(tmp_path / "c.toml"))) == config


@pytest.mark.parametrize("name", ["out_dir", "text", "data_dir"])
def test_a_name_that_is_not_utf8_is_refused(name):
    assert "not valid UTF-8" in refused(**{name: "book-\udcff.txt"})


HOSTILE = {
    "not utf-8": b'out_dir = "\xff"',
    "utf-16": "seed = 1".encode("utf-16"),
    "no toml": b"seed = = 1",
    "twice": b"seed = 1\nseed = 2",
    "deep lists": b"text = " + b"[" * 50_000,
    "deep tables": b"seed = " + b"{a=" * 50_000,
    "deep keys": b"seed" + b".a" * 3_000 + b" = 1",
    "deep keys in a list": b"text = [{a" + b".a" * 3_000 + b" = 1}]",
    "a long number": b"seed = " + b"1" * 5000,
    "a long hexadecimal number": b"seed = 0x" + b"f" * 9000,
    "a huge fraction": b"max_lr = 1e999",
    "nan": b"max_lr = nan",
    "a date": b"seed = 1979-05-27T07:32:00Z",
    "a table": b"[seed]\na = 1",
    "a list": b"seed = [1]",
    "a truth": b"seed = true",
    "a text": b'seed = "one"',
    "an unknown name": b"n_layers = 3",
    "a long name": b"a" * 100_000 + b" = 1",
    "an empty name": b'"" = 1',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused(tmp_path, content):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.toml|seed = |text = |max_lr = "):
        from_settings(read_toml(str(path)))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda t: f"seed = {t}".encode("utf-8", "replace")))
def test_any_bytes_are_settings_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        assert isinstance(from_settings(read_toml(str(path))), TrainConfig)


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "absent.toml", tmp_path / "folder.toml", tmp_path / "nul\0.toml"):
        if "folder" in path.name:
            path.mkdir()
        with pytest.raises(UserError, match="cannot be read"):
            read_toml(str(path))


def test_an_unknown_preset():
    with pytest.raises(UserError, match="unknown preset 'chaptr'; did you mean 'chapter'"):
        read_toml("chaptr")
    with pytest.raises(UserError, match=r"known: chapter, .*gpt2-124m, or a \.toml file"):
        read_toml("zzz")


def test_settings_load_no_torch():
    code = (
        "import sys, llm, llm.config; llm.GPTConfig(); llm.config.from_settings(llm.config.read_toml('gpt2-124m'));"
        "print([m for m in ('torch', 'numpy', 'tokenizers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def notices(preset, **given):
    lines = []
    return over_preset(preset, given, lines.append), lines


CONFLICTS = {  # preset, what the user gives, the resulting settings, part of the notice
    "steps": (
        {"warmup_steps": 100},
        {"max_iters": 50},
        {"warmup": 1},
        "warmup_steps = 100 of the preset is ignored",
    ),
    "peak": (
        {"min_lr": 1e-4},
        {"max_lr": 5e-5},
        {"final_lr": 5e-6},
        "min_lr = 0.0001 of the preset",
    ),
    "width": ({"n_head": 6, "n_embd": 384}, {"n_embd": 128}, {"n_head": 4}, "n_head = 6 of the preset is ignored"),
    "ddp": (
        {"cpu_offload": True, "parallel": "fsdp"},
        {"parallel": "ddp"},
        {"cpu_offload": False},
        "cpu_offload = True",
    ),
    "fsdp": ({"compile": True}, {"parallel": "fsdp"}, {"compile": False}, "compile = True of the preset"),
    "half": ({"dtype": "float16"}, {"parallel": "fsdp"}, {"dtype": "auto"}, "dtype = 'float16' of the preset"),
    "limit": (
        {"text": ["tinystories"], "text_limit": "9M"},
        {"text": "a"},
        {"text_limit": None},
        "text_limit = 9000000",
    ),
    "tokens": ({"tokenizer": "char", "vocab_size": 65}, {"tokenizer": "byte"}, {"vocab_size": None}, "vocab_size = 65"),
    "letters": ({"tokenizer": "char", "vocab_size": 65}, {"text": "a"}, {"vocab_size": None}, "vocab_size = 65"),
    "shape": (
        {"n_layer": 6, "n_head": 6, "n_embd": 384, "dropout": 0.2, "tokenizer": "char"},
        {"init_from": "old"},
        {"n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.2, "tokenizer": "auto"},
        "tokenizer = 'char' of the preset is ignored: the weights of init_from determine it",
    ),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_given_settings_override_a_preset(name):
    preset, given, expected, words = CONFLICTS[name]
    config, lines = notices(preset, **given)
    assert {name: value_of(config, name) for name in expected} == expected
    assert len(lines) == 1
    assert words in lines[0]


@pytest.mark.parametrize(
    ("preset", "given"),
    [
        ({"warmup_steps": 100}, {"max_steps": 101}),
        ({"warmup_steps": 100}, {"out_dir": "a"}),
        ({"min_lr": 1e-4}, {"max_lr": 1e-4}),
        ({"n_head": 6, "n_embd": 384}, {"n_embd": 192}),
        ({"text": ["a"], "text_limit": None, "tokenizer": "char", "vocab_size": 65}, {"text": "a"}),
        ({"text": ["tinystories"], "text_limit": "9M"}, {"text": "fineweb-edu"}),
        ({"tokenizer": "bpe", "vocab_size": 8192}, {"text": "a"}),
        ({"init_from": "old", "n_layer": 6}, {"init_from": "old"}),
    ],
)
def test_the_rest_of_a_preset_stays(preset, given):
    config, lines = notices(preset, **given)
    assert lines == []
    assert config == from_settings(preset | given)


@pytest.mark.parametrize(
    ("preset", "given", "words"),
    [
        (
            {"max_steps": 100},
            {"warmup_steps": 100},
            "warmup_steps = 100 is not below max_steps = 100; lower it",
        ),
        ({"max_lr": 1e-3}, {"min_lr": 1e-2}, "min_lr = 0.01 is above max_lr = 0.001; lower it, or raise max_lr"),
        ({"n_embd": 384}, {"n_head": 5}, "n_embd = 384 is not divisible by n_head = 5; try --n_embd 385"),
        ({"warmup_steps": 100}, {"max_steps": 0}, "max_steps = 0: expected"),
        ({"n_head": 6, "n_embd": 384}, {"n_embd": -1}, "n_embd = -1: expected"),
    ],
)
def test_what_is_given_is_never_changed(preset, given, words):
    lines = []
    with pytest.raises(UserError, match=words):
        over_preset(preset, given, lines.append)
    assert lines == []


def test_the_texts_with_a_limit_are_those_of_the_hub():
    assert set(TEXTS_WITH_LIMIT) == set(TEXTS)


@pytest.mark.parametrize("name", ["out_dir", "data_dir", "init_from", "text"])
def test_a_home_folder_is_expanded(monkeypatch, name):
    monkeypatch.setenv("HOME", "/home/ann")
    value = value_of(from_settings({name: "~/x"}), name)
    assert value == (("/home/ann/x",) if name == "text" else "/home/ann/x")
    assert value_of(from_settings({name: "a~/~"}), name) in ("a~/~", ("a~/~",))


def test_an_unknown_home_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(out_dir="~nobody-of-that-name/x") == (
        "'~nobody-of-that-name/x': cannot find the home folder ~nobody-of-that-name; give the whole path"
    )
    monkeypatch.setenv("HOME", "")
    assert "'~/x': cannot find the home folder ~" in refused(out_dir="~/x")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # as in a container with a user without a name
    assert "'~/x': cannot find the home folder ~" in refused(text=["~/x"])
    (tmp_path / "~notes.txt").touch()
    assert from_settings({"text": "~notes.txt"}).text == ("~notes.txt",)  # a file, as a shell's pattern names it


def test_a_toml_file_in_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.toml").write_text('out_dir = "~/run"\n', encoding="utf-8")
    assert from_settings(read_toml("~/mine.toml")).out_dir == f"{tmp_path}/run"


def test_a_toml_file_that_names_a_setting_twice(tmp_path):
    (tmp_path / "twice.toml").write_text("max_iters = 5\nmax_steps = 7\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"twice\.toml: max_steps is given twice"):
        read_toml(str(tmp_path / "twice.toml"))
