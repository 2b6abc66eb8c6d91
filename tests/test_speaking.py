"""How a continuation is drawn and where it ends: the knobs against transformers' logits processors, and by hand."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import config_for, trained

from llm.commands.main import main
from llm.commands.sample import print_samples
from llm.config import GPTConfig
from llm.errors import UserError
from llm.generate import generate, next_probabilities, penalise, tokens_in
from llm.model import GPT
from llm.page.playground import Playground, parse_question
from llm.run import Run
from llm.tokens.bpe import train_bpe
from llm.tokens.tokenizer import Bytes, Characters
from llm.tokens.writing import Writing

V = 61


def by_transformers(ids, logits, temperature, top_k, top_p, min_p, penalty):
    """The probabilities of transformers: its processors in the order in which its `generate` has them."""
    transformers = pytest.importorskip("transformers")
    steps = transformers.LogitsProcessorList()
    if penalty != 1:
        steps.append(transformers.RepetitionPenaltyLogitsProcessor(penalty))
    steps.append(transformers.TemperatureLogitsWarper(temperature))
    if top_k:
        steps.append(transformers.TopKLogitsWarper(top_k))
    if top_p < 1:
        steps.append(transformers.TopPLogitsWarper(top_p))
    if min_p > 0:
        steps.append(transformers.MinPLogitsWarper(min_p))
    return torch.softmax(steps(ids, logits), 1)


def test_probabilities_are_those_of_transformers():
    torch.manual_seed(0)
    grid = itertools.product([0.5, 1.0, 1.7], [None, 5, 20], [1.0, 0.6, 0.9], [0.0, 0.05, 0.3, 1.0], [1.0, 1.3, 0.8])
    for temperature, top_k, top_p, min_p, penalty in grid:
        logits, ids = 2 * torch.randn(4, V), torch.randint(V, (4, 9))
        expected = by_transformers(ids, logits, temperature, top_k, top_p, min_p, penalty)
        found = next_probabilities(penalise(logits, tokens_in(ids, V), penalty), temperature, top_k, top_p, min_p)
        assert torch.allclose(found, expected, atol=1e-6)
        assert torch.equal(found > 0, expected > 0)


def test_the_order_of_the_processors_is_that_of_transformers_generate():
    transformers = pytest.importorskip("transformers")
    config = transformers.GenerationConfig(
        temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.3, do_sample=True, max_length=20
    )
    tiny = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=V, n_embd=8, n_layer=1, n_head=1))
    steps = tiny._get_logits_processor(config, input_ids_seq_length=3)
    names = [type(step).__name__.removesuffix("LogitsProcessor").removesuffix("LogitsWarper") for step in steps]
    assert names == ["RepetitionPenalty", "Temperature", "TopK", "TopP", "MinP"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=V, block_size=12, n_layer=2, n_head=2, n_embd=16))
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model.eval()


@torch.no_grad()
def test_the_penalty_is_for_all_tokens_so_far_beyond_the_context_too(model):
    ids = torch.randint(V, (3, 5), generator=torch.Generator().manual_seed(1))
    for new in generate(model, ids, 25, temperature=0, repetition_penalty=1.5):
        logits = model(ids[:, -12:])[0][:, -1]
        assert torch.equal(new, by_transformers(ids, logits, 1.0, None, 1.0, 0.0, 1.5).argmax(1))
        ids = torch.cat([ids, new[:, None]], 1)


@torch.no_grad()
def test_draws_have_the_distribution_of_the_processors(model):
    """20,000 draws of one token: no share further off than five standard deviations."""
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    knobs = {"temperature": 1.3, "top_k": 30, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.4}
    (drawn,) = generate(model, prompt.expand(20_000, -1), 1, generator=torch.Generator().manual_seed(0), **knobs)
    expected = by_transformers(prompt, model(prompt)[0][:, -1], 1.3, 30, 0.95, 0.05, 1.4)[0]
    share = torch.bincount(drawn, minlength=V) / 20_000
    assert (share[expected == 0] == 0).all()
    assert 3 < int((expected > 0).sum()) < 30
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / 20_000).sqrt()).all()


@pytest.mark.parametrize(
    ("knob", "value"), [("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0), ("repetition_penalty", np.inf)]
)
def test_a_knob_out_of_its_range_is_refused(model, knob, value):
    with pytest.raises(UserError, match=f"^{knob} = {value!r}: expected "):
        next(generate(model, torch.tensor([[1]]), 1, **{knob: value}))


# ---- where it ends


def written(tokens, tokenizer=None, **how):
    """The pieces of text of a continuation, and the number of tokens that it took."""
    writing, pieces = Writing(tokenizer or Bytes(), **how), []
    for count, token in enumerate(tokens):
        pieces.append(writing.add(token))
        if writing.ended:
            return pieces, count + 1
    return [*pieces, writing.rest()], len(tokens)


def test_it_ends_at_end_of_text_which_is_no_part_of_it():
    assert written([97, 98, 256, 99]) == (["a", "b", ""], 3)
    assert "".join(written([97, 256, 98], ignored=True)[0]) == "a<|endoftext|>b"
    assert "".join(written([0, 1, 0], Characters("ab"))[0]) == "aba"  # char has no end-of-text
    assert written([0xC3, 256])[0] == ["", "\ufffd"]  # what was held back is shown


def test_it_ends_before_a_stop_text_and_holds_back_what_may_be_one():
    assert written(b"one\n\ntwo", stop=["\n\n"]) == (["o", "n", "e", "", ""], 5)
    assert written(b"aab", stop=["ab"]) == (["", "a", ""], 3)
    assert written(b"ac", stop=["ab"]) == (["", "ac", ""], 2)
    assert written(b"xa", stop=["ab"]) == (["x", "", "a"], 2)  # at the end it was none
    assert "".join(written("né".encode(), stop=["é"])[0]) == "n"


def test_a_stop_text_within_a_token_and_across_tokens():
    tokenizer = train_bpe(["the end of the tale. " * 50], 290)
    text = "the end of the tale. the end"
    for stop in ("nd of", "e", "ta", ". ", "never"):
        expected = text.partition(stop)[0]
        assert "".join(written(tokenizer.encode(text).tolist(), tokenizer, stop=[stop])[0]) == expected


def test_random_texts_end_before_the_stop_text_that_is_complete_first():
    draw = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(draw.choice(list("ab"), 12))
        stops = ["".join(draw.choice(list("ab"), draw.integers(1, 5))) for _ in range(2)]
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        first = min(ends)[0] if ends else None
        expected = text if first is None else text[: min(start for end, start in ends if end == first)]
        assert "".join(written(text.encode(), stop=stops)[0]) == expected


# ---- the command and the playground


def test_sample_speaks(here, losscurve, capsys):
    trained(config_for(here, tokenizer="byte", max_steps=8))
    run = Run.open("checkpoints")
    plain = losscurve("sample --prompt ab --max_new_tokens 40 --seed 1 --ignore_end")[1]
    assert plain[:-1] == run.sample("ab", 40, 1, ignore_end=True)
    stop = plain[12:14]
    assert main(["sample", "--prompt=ab", "--max_new_tokens=40", "--seed=1", f"--stop={stop}", "--stop=never"]) == 0
    stopped = "ab" + plain[2:].partition(stop)[0]
    assert capsys.readouterr().out == stopped + "\n"
    assert run.sample("ab", 40, 1, stop=stop) == run.sample("ab", 40, 1, stop=["never", stop]) == stopped
    knobs = {"temperature": 1.5, "top_k": 90, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3}
    line = " ".join(f"--{name} {value}" for name, value in knobs.items())
    knobbed = losscurve(f"sample --prompt ab --max_new_tokens 30 --seed 1 {line}")[1]
    assert run.sample("ab", 30, 1, **knobs) + "\n" == knobbed != plain
    Path("prompts.txt").write_text("ab\r\n\ncd\n", encoding="utf-8")
    line = "--max_new_tokens 9 --seed 1 --num_samples 2 --min_p 0.1 --repetition_penalty 1.3"
    alone = [losscurve(f"sample --prompt {prompt} {line}")[1] for prompt in ("ab", "cd")]
    assert losscurve(f"sample --prompts prompts.txt {line}")[1] == "===============\n".join(alone)
    assert losscurve(f"sample --prompts prompts.txt {line} --no-stream")[1] == "===============\n".join(alone)
    Path("none.txt").write_text("\n\n")
    Path("latin.txt").write_bytes("ab\ncafé\n".encode("latin-1"))
    for flags, reason in {
        "--stop=": "stop = '': expected at least one character",
        "--min_p 2": "min_p = 2.0: expected 0 to 1",
        "--prompts no.txt": "prompts no.txt: cannot be read (No such file or directory)",
        "--prompts none.txt": "prompts none.txt: holds no prompt; write one a line",
        "--prompts latin.txt": "prompts latin.txt: not UTF-8 at byte 6 (line 2): ",
        "--checkpoint checkpoints/model.pt --out_dir checkpoints": "out_dir = 'checkpoints' is a run, and checkpoint = "
        "'checkpoints/model.pt' stands instead of one; leave one of them out",
    }.items():
        code, out, err = losscurve(f"sample {flags}")
        assert (code, out) == (2, ""), flags
        assert err.startswith(f"error: {reason}"), err


def test_without_a_prompt_a_model_begins_with_what_it_can_read(here, losscurve):
    trained(config_for(here, tokenizer="char", max_steps=1, warmup_steps=0))
    code, out, err = losscurve("sample --checkpoint checkpoints/model.pt --max_new_tokens 3 --num_samples 1")
    assert (code, err) == (0, "")
    assert len(out.strip("\n")) <= 4


def test_a_prompt_that_the_model_cannot_read_is_named_before_anything_is_drawn(here, losscurve):
    trained(config_for(here, tokenizer="char", max_steps=1, warmup_steps=0))
    Path("prompts.txt").write_text("ab\n\naß\n", encoding="utf-8")
    cause = "character 'ß' (U+00DF) is not in the vocabulary of 12 characters; remove it, since"
    for line in ("sample --prompts prompts.txt", "sample --checkpoint checkpoints/model.pt --prompts prompts.txt"):
        code, out, err = losscurve(line)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: prompts prompts.txt, line 3: {cause}"), err
    with pytest.raises(UserError, match=r"^prompt: character 'ß' .*; remove it, since this model"):
        Run.open("checkpoints").sample("aß")


def test_one_sample_is_printed_while_it_is_drawn(capsys):
    for stream, count in itertools.product((True, False), (1, 2)):
        printed = []

        def pieces(count=count, printed=printed):
            for number in range(3):
                printed.append(capsys.readouterr().out)
                yield [f"{number}{sample}" for sample in "ab"[:count]]

        print_samples("p", pieces(), count, stream)
        assert printed == (["p", "0a", "1a"] if stream else ["", "", ""])
        other = "---------------\np0b1b2b\n" if count == 2 else ""
        assert "".join([*printed, capsys.readouterr().out]) == f"p0a1a2a\n{other}"


def test_the_playground_draws_as_sample_does_and_ends_a_document(here, monkeypatch):
    trained(config_for(here, tokenizer="byte", max_steps=8))
    run = Run.open("checkpoints")
    knobs = {"temperature": 1.5, "top_k": None, "top_p": 1.0, "min_p": 0.02, "repetition_penalty": 30.0}
    asked = parse_question(json.dumps({"prompt": "ab", "seed": 7, "count": 40, **knobs}).encode())
    ids = torch.from_numpy(run.tokenizer.encode("ab").astype(np.int64))[None]
    own = torch.Generator().manual_seed(7)
    drawn = [int(token) for token in generate(run.model("last"), ids, 40, generator=own, vocab_size=257, **knobs)]
    ground = Playground()
    assert [token["id"] for token in ground.stream(run.path, asked)] == drawn
    ground.load(run.path, "last")[1].end_of_text = drawn[11]
    assert [token["id"] for token in ground.stream(run.path, asked)] == drawn[: drawn.index(drawn[11]) + 1]
