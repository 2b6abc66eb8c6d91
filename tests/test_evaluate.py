"""Loss on fixed windows against a straightforward computation in fp64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from llm.config import GPTConfig
from llm.evaluate import evaluate, sliding_windows, windows
from llm.model import GPT

SMALL = GPTConfig(vocab_size=31, block_size=8, n_layer=2, n_head=2, n_embd=12)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(SMALL)
    for p in model.parameters():  # away from the initialisation, where every token is as likely
        p.data += 0.3 * torch.randn_like(p)
    return model


def predicted(count, block_size, limit):
    """Positions predicted, in order."""
    starts, partial = windows(count, block_size, limit)
    full = [start + 1 + t for start in starts.tolist() for t in range(block_size)]
    return full + list(range(count - partial, count))


def reference(model, tokens, positions, block_size):
    """Sum over positions of -ln p, each predicted from the start of its window, in fp64, one window at a time."""
    model64 = GPT(SMALL).double().eval()
    model64.load_state_dict({name: p.double() for name, p in model.state_dict().items()})
    total = 0.0
    for position in positions:
        start = (position - 1) // block_size * block_size
        ids = torch.from_numpy(tokens[start:position].astype(np.int64))[None]
        logits = model64(ids)[0][0, -1]
        total -= F.log_softmax(logits, 0)[int(tokens[position])].item()
    return total


@given(st.integers(2, 400), st.integers(1, 70))
def test_every_token_after_the_first_is_predicted_once(count, block_size):
    assert predicted(count, block_size, count - 1) == list(range(1, count))
    assert windows(count, block_size, 2**60)[1] == (count - 1) % block_size


@given(st.integers(2, 5000), st.integers(1, 70), st.integers(1, 3000))
@example(6, 8, 3)
def test_a_limited_part_is_spread_evenly(count, block_size, limit):
    positions = predicted(count, block_size, limit)
    starts, partial = windows(count, block_size, limit)
    assert np.array_equal(starts, windows(count, block_size, limit)[0])
    assert len(positions) == len(set(positions)) > 0  # none twice
    assert min(positions) >= 1
    assert max(positions) < count
    assert len(positions) <= max(limit, block_size)  # at least a window
    if count - 1 > limit and len(starts):
        full = (count - 1) // block_size
        assert partial == 0
        assert len(starts) == max(1, limit // block_size)
        steps = np.diff(starts // block_size, append=full)  # to the end as between two
        assert steps.max() - steps.min() <= 1
        assert starts[0] == 0


@pytest.mark.parametrize("count", [2, 5, 9, 10, 60])  # partial windows, a full one, one token over, many
def test_the_loss_is_the_mean_over_every_token(model, count):
    tokens = np.random.default_rng(count).integers(0, 31, count).astype("<u2")
    found = evaluate(model, tokens, 8, 10**6)
    assert found.tokens == count - 1
    assert found.loss == pytest.approx(reference(model, tokens, range(1, count), 8) / (count - 1), rel=1e-5)
    assert found.bits_per_byte is None


def test_pieces_of_any_size_give_the_same(model, monkeypatch):
    tokens = np.random.default_rng(1).integers(0, 31, 100).astype("<u2")
    expected = reference(model, tokens, range(1, 100), 8) / 99
    for size in (1, 17, 24, 10**6):
        monkeypatch.setattr("llm.evaluate.WINDOW_TOKENS", size)
        assert evaluate(model, tokens, 8, 10**6).loss == pytest.approx(expected, rel=1e-5)


def test_a_limit_takes_the_windows_it_says(model):
    tokens = np.random.default_rng(2).integers(0, 31, 100).astype("<u2")
    found = evaluate(model, tokens, 8, 35)
    positions = [s + t for s in (0, 24, 48, 72) for t in range(1, 9)]  # 12 windows, 4 of them
    assert found.tokens == 32
    assert found.loss == pytest.approx(reference(model, tokens, positions, 8) / 32, rel=1e-5)


def test_a_limit_below_a_text_below_a_window(model):
    tokens = np.array([1, 2, 3, 4, 5, 6], dtype="<u2")
    assert evaluate(model, tokens, 8, 3).tokens == 5


def test_bits_per_byte_by_hand(model):
    tokens = np.array([3, 1, 2, 2, 0, 5, 3, 1, 4, 1, 5], dtype="<u2")
    lengths = np.array([1, 2, 3, 0, 7, 4, *[100] * 25])
    size = 2 + 3 + 3 + 1 + 4 + 0 + 2 + 7 + 2 + 4  # of all but the first token
    found = evaluate(model, tokens, 8, 10**6, lengths)
    expected = reference(model, tokens, range(1, 11), 8) / math.log(2) / size
    assert found.bits_per_byte == pytest.approx(expected, rel=1e-5)
    limited = evaluate(model, tokens, 8, 8, lengths)  # over the bytes of those very tokens
    expected = reference(model, tokens, range(1, 9), 8) / math.log(2) / (2 + 3 + 3 + 1 + 4 + 0 + 2 + 7)
    assert limited.bits_per_byte == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_as_it_was(training):
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=31, block_size=8, n_layer=1, n_head=1, n_embd=8, dropout=0.9)
    model = GPT(config).train(training)
    tokens = np.arange(30, dtype="<u2")
    first = evaluate(model, tokens, 8, 10**6)
    assert model.training == training
    assert all(module.training == training for module in model.modules())
    assert evaluate(model, tokens, 8, 10**6) == first  # and dropout was off
    assert all(p.grad is None for p in model.parameters())


# ---- windows that slide


@given(st.integers(2, 400), st.integers(1, 70), st.integers(1, 70))
@example(10, 9, 9)
def test_sliding_windows_count_every_token_once_from_as_much_text_as_they_may(count, block_size, stride):
    stride = min(stride, block_size)
    counted = []
    for starts, length, new in sliding_windows(count, block_size, stride):
        assert 1 <= new <= length <= block_size
        for start in starts.tolist():
            assert start % stride == 0
            counted += range(start + length - new + 1, start + length + 1)
    assert counted == list(range(1, count))


@pytest.mark.parametrize(("count", "stride"), [(5, 3), (9, 3), (10, 3), (60, 3), (61, 8), (60, 1)])
def test_the_loss_of_sliding_windows(model, monkeypatch, count, stride):
    """Each token from the start of the first window that reaches it, in fp64."""
    tokens = np.random.default_rng(count).integers(0, 31, count).astype("<u2")
    total = 0.0
    for position in range(1, count):
        start = max(0, math.ceil((position - 8) / stride) * stride)
        model64 = GPT(SMALL).double().eval()
        model64.load_state_dict({name: p.double() for name, p in model.state_dict().items()})
        ids = torch.from_numpy(tokens[start:position].astype(np.int64))[None]
        total -= F.log_softmax(model64(ids)[0][0, -1], 0)[int(tokens[position])].item()
    lengths = np.arange(31)
    for size in (1, 24, 10**6):
        monkeypatch.setattr("llm.evaluate.WINDOW_TOKENS", size)
        found = evaluate(model, tokens, 8, 3, lengths, stride=stride)
        assert found.tokens == count - 1
        assert found.bytes == int(tokens[1:].astype(int).sum())
        assert found.loss == pytest.approx(total / (count - 1), rel=1e-5)
        assert found.bits_per_byte == pytest.approx(total / math.log(2) / found.bytes, rel=1e-5)
