"""Sampling: the knobs against values computed by hand, the tokens against the chapter's own loop."""

import itertools
import math

import numpy as np
import pytest
import torch

from llm.config import GPTConfig
from llm.errors import UserError
from llm.generate import continue_text, generate, largest, next_probabilities
from llm.model import GPT

SMALL = GPTConfig(vocab_size=61, block_size=12, n_layer=2, n_head=2, n_embd=16)
LN = [math.log(p) for p in (0.4, 0.1, 0.3, 0.2)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(SMALL)
    for p in model.parameters():  # away from the initialisation, where every token is as likely
        p.data += 0.3 * torch.randn_like(p)
    return model


def probabilities(logits, **knobs):
    return next_probabilities(torch.tensor([logits]), **knobs)[0].tolist()


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, [0.4, 0.1, 0.3, 0.2]),
        ({"temperature": 0.5}, [16 / 30, 1 / 30, 9 / 30, 4 / 30]),  # squares
        ({"temperature": 2.0}, [p**0.5 / sum(q**0.5 for q in (0.4, 0.1, 0.3, 0.2)) for p in (0.4, 0.1, 0.3, 0.2)]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 2}, [4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 4}, [0.4, 0.1, 0.3, 0.2]),
        ({"top_k": 99}, [0.4, 0.1, 0.3, 0.2]),
        ({"top_p": 0.39}, [1, 0, 0, 0]),
        ({"top_p": 0.41}, [4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.69}, [4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.71}, [4 / 9, 0, 3 / 9, 2 / 9]),
        ({"top_p": 0.95}, [0.4, 0.1, 0.3, 0.2]),
        ({"top_p": 1.0}, [0.4, 0.1, 0.3, 0.2]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        # top-p before the temperature would keep two: 0.4 + 0.3 reach 0.6; after it 0.53 + 0.3 do too, 0.8 tells
        ({"temperature": 0.5, "top_p": 0.8}, [16 / 25, 0, 9 / 25, 0]),  # before it: three
        ({"temperature": 0.5, "top_p": 0.52}, [1, 0, 0, 0]),  # before it: two
        # top-p before top-k would keep two: 0.4 + 0.3 reach 0.55; after it 4/7 alone does
        ({"top_k": 2, "top_p": 0.55}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.42}, [1, 0, 0, 0]),  # 4/9; before it: two
        ({"temperature": 0.5, "top_k": 2, "top_p": 0.63}, [1, 0, 0, 0]),  # 16/25; in any other order: two
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"temperature": 0, "top_k": 3, "top_p": 0.5}, [1, 0, 0, 0]),
        ({"temperature": 1e-3}, [1, 0, 0, 0]),
        ({"temperature": 1e-60}, [1, 0, 0, 0]),
        ({"temperature": 1e30}, [0.25, 0.25, 0.25, 0.25]),
        # beyond what float32 holds, in which the knobs are used
        ({"temperature": 1e-300}, [1, 0, 0, 0]),
        ({"temperature": 1e300}, [0.25, 0.25, 0.25, 0.25]),
        ({"temperature": 1e300, "top_k": 2, "top_p": 1e-300}, [1, 0, 0, 0]),
        ({"top_p": 1e-50}, [1, 0, 0, 0]),
        ({"top_p": 1e-300}, [1, 0, 0, 0]),
        ({"top_p": 1 - 1e-12}, [0.4, 0.1, 0.3, 0.2]),
    ],
)
def test_knobs_by_hand(knobs, expected):
    assert probabilities(LN, **knobs) == pytest.approx(expected, abs=1e-6)
    shifted = [value + 50 for value in LN]  # a constant on all logits changes nothing
    assert probabilities(shifted, **knobs) == pytest.approx(expected, abs=1e-4)


def test_rows_are_apart():
    logits = torch.tensor([LN, LN[::-1]])
    both = next_probabilities(logits, temperature=0.5, top_k=3, top_p=0.9)
    assert torch.equal(both[0], both[1].flip(0))
    assert torch.equal(logits, torch.tensor([LN, LN[::-1]]))  # the logits are left alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_probabilities_are_float32(dtype):
    found = next_probabilities(torch.tensor([LN], dtype=dtype), top_p=0.95)
    assert found.dtype == torch.float32
    assert found[0].tolist() == pytest.approx([0.4, 0.1, 0.3, 0.2], abs=1e-2)


def test_ties():
    assert sorted(probabilities([1.0] * 4, top_k=2)) == [0, 0, 0.5, 0.5]  # k tokens, whichever
    assert sorted(probabilities([1.0] * 4, top_p=0.6)) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    assert probabilities([0.0, 2.0, 2.0], temperature=0) == [0, 1, 0]  # the first
    assert probabilities([0.0, 2.0, 2.0], temperature=1e-50) == pytest.approx([0, 0.5, 0.5])


@pytest.mark.parametrize(("width", "k"), [(50257, 50), (50257, 1), (640, 9), (640, 10), (703, 3), (64, 1), (5, 3)])
def test_largest_is_topk(width, k):
    torch.manual_seed(width + k)
    x = torch.randn(4, width)
    x[1, 7 % width] = -math.inf
    x[2, -1] = 99.0  # in what is left over beyond whole groups
    values, places = largest(x, k)
    expected, where = x.topk(k, dim=1)
    assert torch.equal(values, expected)
    assert torch.equal(places, where)


@pytest.mark.parametrize("temperature", [1e-300, 1.0, 1e300])
def test_impossible_tokens_stay_impossible_at_any_temperature(temperature):
    assert probabilities([0.0, -math.inf, 0.0], temperature=temperature) == pytest.approx([0.5, 0, 0.5])


def test_impossible_tokens_stay_impossible():
    assert probabilities([0.0, -math.inf, 0.0], top_k=3, top_p=0.99, temperature=0.7) == pytest.approx([0.5, 0, 0.5])


def chapter(model, idx, count):
    """The loop of the chapter's scripts/sample.py."""
    cfg = model.config
    model.eval()
    with torch.no_grad():
        for _ in range(count):
            idx_cond = idx if idx.size(1) <= cfg.block_size else idx[:, -cfg.block_size :]
            logits, _ = model(idx_cond)
            probs = torch.softmax(logits[:, -1, :], dim=-1)
            next_id = torch.multinomial(probs, num_samples=1)
            idx = torch.cat([idx, next_id], dim=1)
    return idx


@pytest.mark.parametrize("length", [1, 7, 11, 12, 13, 30])  # within the window, filling it, and longer
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_are_the_chapters(model, length, rows):
    prompt = torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(length))
    torch.manual_seed(length)
    expected = chapter(model, prompt, 25)[:, length:]
    torch.manual_seed(length)
    assert torch.equal(torch.stack(list(generate(model, prompt, 25)), 1), expected)
    own = torch.Generator().manual_seed(length)
    assert torch.equal(torch.stack(list(generate(model, prompt, 25, generator=own)), 1), expected)


def test_greedy_is_the_likeliest_token_of_the_whole_context(model):
    ids = prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    for _ in range(20):
        logits = model(ids[:, -12:])[0]
        ids = torch.cat([ids, logits[:, -1].argmax(1, keepdim=True)], 1)
    made = torch.stack(list(generate(model, prompt, 20, temperature=0)), 1)
    assert torch.equal(made, ids[:, 3:])
    assert torch.equal(torch.stack(list(generate(model, prompt, 20, top_k=1)), 1), made)
    assert torch.equal(torch.stack(list(generate(model, prompt, 20, top_p=1e-6)), 1), made)


def test_a_row_is_drawn_from_its_own_prompt(model):
    """Greedy, each row of a batch is what its prompt alone gives."""
    prompts = torch.tensor([[1, 2, 3], [40, 50, 60], [7, 7, 7]])
    together = torch.stack(list(generate(model, prompts, 15, temperature=0)), 1)
    for row, prompt in enumerate(prompts):
        alone = torch.stack(list(generate(model, prompt[None], 15, temperature=0)), 1)
        assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("knobs", [{}, {"temperature": 0}, {"top_k": 50}, {"temperature": 5.0, "top_p": 0.99}])
def test_padding_of_the_vocabulary_is_never_drawn(model, knobs):
    prompt = torch.randint(5, (8, 3), generator=torch.Generator().manual_seed(0))
    made = torch.stack(list(generate(model, prompt, 30, vocab_size=5, generator=torch.Generator(), **knobs)), 1)
    assert made.max() < 5
    free = torch.stack(list(generate(model, prompt, 30, generator=torch.Generator(), **knobs)), 1)
    assert free.max() >= 5


class Letters:
    """As much of a tokenizer as `continue_text` asks for."""

    vocab_size = 61

    def encode(self, text):
        return np.array([ord(letter) - 60 for letter in text])


def continued(model, **given):
    """The continuations (num_samples, 30) as lists."""
    tokens = continue_text(model, Letters(), "AbC", 30, temperature=2.0, **given)
    return [list(row) for row in zip(*tokens, strict=True)]


def test_a_samples_draw_is_its_own(model):
    alone, two, five = (continued(model, seed=7, num_samples=count) for count in (1, 2, 5))
    assert five[:2] == two
    assert five[:1] == alone
    assert len({tuple(sample) for sample in five}) == 5
    assert continued(model, seed=8, num_samples=2)[1] != two[1]
    assert continued(model, num_samples=2) != continued(model, num_samples=2)  # without a seed


def test_the_first_sample_is_what_its_seed_alone_draws(model):
    """samples.txt of a run holds it: bit for bit as one generator, seeded with the seed, draws one row."""
    prompt = torch.from_numpy(Letters().encode("AbC"))[None]
    own = torch.Generator().manual_seed(2**40 + 7)
    expected = [int(token) for token in generate(model, prompt, 30, temperature=2.0, generator=own)]
    assert continued(model, seed=2**40 + 7) == [expected]


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70])
def test_a_seed_out_of_its_range_is_refused(model, seed):
    with pytest.raises(UserError, match=f"^seed = {seed}: expected a whole number from 0"):
        continued(model, seed=seed)


def test_tokens_come_one_at_a_time(model):
    stream = generate(model, torch.tensor([[1]]), 10**9, generator=torch.Generator())
    assert [token.shape for token in itertools.islice(stream, 3)] == [(1,)] * 3
    stream.close()
    assert list(generate(model, torch.tensor([[1]]), 0)) == []


def test_no_gradient_and_no_dropout(monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=61, block_size=12, n_layer=1, n_head=1, n_embd=8, dropout=0.9)).train()
    one, other = (list(generate(model, torch.tensor([[1]]), 20, temperature=0)) for _ in range(2))
    assert one == other
    assert not model.training
    seen, real = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda *a: (seen.append(real(*a)), seen[-1])[1])
    next(generate(model, torch.tensor([[1]]), 1))
    assert not seen[0].requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", 0),
        ("top_k", -3),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("max_new_tokens", -1),
    ],
)
def test_a_knob_out_of_its_range_is_refused(model, knob, value):
    with pytest.raises(UserError, match=f"^{knob} = {value!r}: expected "):
        next(generate(model, torch.tensor([[1]]), **({"max_new_tokens": 1} | {knob: value})))


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(UserError, match="prompt"):
        next(generate(model, torch.zeros(1, 0, dtype=torch.int64), 1))
    with pytest.raises(TypeError):
        next(generate(model, torch.tensor([[1]]), 1, typical_p=0.5))
