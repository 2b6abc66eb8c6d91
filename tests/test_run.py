"""A run in a notebook: what it shows, and that nothing in a name or a sample is more than text."""

import base64
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import SMALL, append, config_for, trained, write_samples

from llm import Run, fit
from llm.config import from_settings, write_toml
from llm.errors import Failure, UserError
from llm.record.metrics import best
from llm.run import in_python
from llm.start.texts import run_tokenizer


class Page(HTMLParser):
    """The tags and the text of a page; an unclosed or stray tag is an error."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.text, self.picture, self._open = [], [], "", []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert {name for name, _ in attributes} <= {"alt", "style", "src"}
        if tag == "img":
            self.picture = dict(attributes)
        else:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_notebook_shows_losses_curve_settings_and_a_sample(here):
    run = fit(here / "text.txt", out_dir=here / "run", say=lambda _: None, **SMALL)
    page = Page(run._repr_html_())
    assert page.tags == ["h3", "table", *["tr", "th", "td"] * 4, "img", "p", "pre"]
    assert page.text[0] == "run"
    facts = dict(zip(page.text[1:9:2], page.text[2:9:2], strict=True))
    low = best(run.record)
    assert facts["steps"] == "12 of 12"
    assert facts["best val loss"] == (
        f"{low['loss']:.4f} nats per token, {low['bits_per_byte']:.3f} bits per byte, at step {low['step']}"
    )
    assert facts["last"] == f"{run.record[-1]['loss']:.4f} at step 12"
    settings = facts["not as by default"]
    assert "n_layer 2" in settings
    assert "max_lr 0.01" in settings
    assert r"sample_prompt '\n'" in settings
    assert not any(name in settings for name in ("min_lr", "seed", "out_dir", "data_dir"))  # a tenth of max_lr
    header, _, content = page.picture["src"].partition(",")
    assert header == "data:image/png;base64"
    assert base64.b64decode(content).startswith(b"\x89PNG")
    assert page.text[-1] == run.samples[-1].prompt + run.samples[-1].text
    assert [sample.step for sample in run.samples] == [0, 4, 8, 12]


def test_what_differs_from_the_defaults_is_what_was_set(tmp_path):
    config = from_settings({"out_dir": "x", "data_dir": "y", "max_steps": 1000, "warmup_steps": 20, "dropout": 0.1})
    run = Run(tmp_path, config)
    assert run.changed() == {"max_steps": 1000, "dropout": 0.1}  # 20 are 2 % of the steps
    assert Run(tmp_path, from_settings({"warmup_steps": 99, "min_lr": 3e-5})).changed() == {"warmup_steps": 99}
    assert Run(tmp_path, from_settings({})).changed() == {}


@pytest.mark.parametrize("evil", ['<script>alert("1")</script>', '"><img src=x onerror=alert(1)>', "</pre></td>&lt;"])
def test_names_and_samples_are_text(tmp_path, evil):
    path = tmp_path / evil.replace("/", "\\")
    path.mkdir()
    (path / "config.toml").write_text(
        write_toml(from_settings({"text": evil, "sample_prompt": evil})), encoding="utf-8"
    )
    append(path, step=0, split="val", loss=5.0)
    write_samples(path, (0, 5.0, evil))
    page = Page(Run.open(path)._repr_html_())
    assert page.tags == ["h3", "table", *["tr", "th", "td"] * 4, "img", "p", "pre"]
    assert page.text[0] == path.name
    assert page.picture["alt"] == f"loss curve of {path.name}"
    assert page.text[-1] == evil
    assert f"text {evil}" in page.text[8]


def test_tokens_of_unknown_origin_are_no_others_than_those_of_the_new_run(here):
    """GPT-2's if there are as many; a padded or larger vocabulary is another's, or nobody knows."""
    for size in (50_304, 61_000, 66):
        assert run_tokenizer(here, size, print) is None
    trained(config_for(here, max_steps=1, warmup_steps=0))
    Path("checkpoints/tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"^checkpoints: has no tokenizer\.json, and its 12 tokens are not GPT-2's"):
        Run.open("checkpoints").sample("a")


def test_a_resume_takes_no_preset_and_replaces_nothing(here):
    for more in ({"preset": "chapter"}, {"overwrite": True}):
        with pytest.raises(UserError, match="resume uses the settings of the run itself"):
            fit(resume=True, **more)


def test_a_run_that_has_just_begun_can_be_shown(tmp_path):
    (tmp_path / "config.toml").write_text(write_toml(from_settings({})), encoding="utf-8")
    append(tmp_path, step=0, split="train", loss=5.0)
    page = Page(Run.open(tmp_path)._repr_html_())
    assert page.text[1:] == ["steps", "0 of 5,000", "not as by default", "nothing"]


@pytest.mark.parametrize(
    "text",
    [
        "To be, or not to be " * 400,
        "a line\nanother\n" * 60,
        "a line\nanother",
        ["text.txt", "a line\nanother"],
        "x/" * 3000,
        "a\0b",
    ],
)
def test_a_text_in_place_of_a_path_is_named_as_such(here, text):
    with pytest.raises(UserError) as error:
        fit(text, **SMALL)
    words = str(error.value)
    assert words.endswith(": that looks like a text, not a path; write it to a file and give the file's name")
    assert len(words) < 250
    assert "\n" not in words
    assert [path.name for path in here.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("name", ["out_dir", "data_dir", "init_from"])
def test_so_is_one_in_place_of_a_folder(here, name):
    with pytest.raises(UserError, match=f"^{name} = 'a long text .*: that looks like a text, not a path; "):
        fit("text.txt", **(SMALL | {name: "a long text " * 50}))
    with pytest.raises(UserError, match=r"^path = 'a long text .*: that looks like a text, not a path; "):
        Run.open("a long text " * 50)


def test_a_python_user_is_told_of_keyword_arguments(here):
    quiet = {"say": lambda _: None}
    fit("text.txt", **SMALL, **quiet)
    cases = [
        ({}, "continue with resume=True, replace it with overwrite=True, or choose another out_dir"),
        ({"resume": True}, "complete at step 12; give a larger max_steps to go on"),
        (
            {"resume": True, "n_layer": 3},
            "cannot become 3 on resume=True; leave it out, or start another run with: fit(",
        ),
        ({"resume": True, "n_layer": 3}, "fit(preset='checkpoints/config.toml', n_layer=3, out_dir='checkpoints-2')"),
        ({"n_head": 5, "overwrite": True}, "try n_embd=20"),
        ({"device": "cuda:9", "overwrite": True}, "try device='auto'"),
    ]
    for given, words in cases:
        with pytest.raises((UserError, Failure)) as error:
            fit("text.txt", **(SMALL | given), **quiet)
        assert words in str(error.value)
        assert "--" not in str(error.value)
    said = []
    fit("text.txt", **SMALL, overwrite=True, say=said.append)
    assert not any("--" in line for line in said)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("lower --max_lr, --grad_clip 1 or --dtype float32", "lower max_lr, grad_clip=1 or dtype='float32'"),
        ("inside would be --warmup_steps 0 to 1", "inside would be warmup_steps=0 to 1"),
        ("works with --parallel fsdp only", "works with parallel='fsdp' only"),
        ("name a text with --text", "name a text with text"),
        ("give the text by --text with another --data_dir, and", "give the text by text with another data_dir, and"),
        ("continue with --out_dir 'a b' --resume", "continue with out_dir='a b' resume=True"),
        # commands stay
        ("make it with losscurve prepare --data_dir, or", "make it with losscurve prepare --data_dir, or"),
        (
            "type losscurve train --out_dir x --resume; or --resume",
            "type fit(out_dir='x', resume=True); or resume=True",
        ),
        ("and --offline was given", "and --offline was given"),
        ("--- step 3 ---", "--- step 3 ---"),
    ],
)
def test_flags_as_keyword_arguments(message, expected):
    assert in_python(message) == expected
