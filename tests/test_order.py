"""The order of epochs against brute force: every window once, at one offset, whoever asks for them."""

import math
from collections import Counter

import numpy as np
import pytest
from conftest import SMALL, config_for, trained

from llm.data import EPOCH_STREAM, ROUNDS, batch_at, epoch_starts, open_data, permuted

KEYS = np.random.Philox(3).random_raw(ROUNDS)


def numbers(count, start=0):
    return np.arange(start, start + count, dtype=np.uint64)


@pytest.mark.parametrize("size", [*range(1, 70), 97, 127, 128, 129, 1009, 4096, 10_007])
def test_it_is_a_permutation(size):
    assert sorted(permuted(numbers(size), size, KEYS).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2**40, 2**40 - 87, 2**39 + 1, 999_983])
def test_it_is_one_to_one_and_within_bounds_for_many_windows(size):
    asked = np.unique(np.random.default_rng(0).integers(0, size, 20_000).astype(np.uint64))
    found = permuted(asked, size, KEYS)
    assert len(np.unique(found)) == len(asked)
    assert found.max() < size
    counts = np.histogram(found.astype(float), 20, (0, size))[0]
    assert abs(counts - len(asked) / 20).max() < 5 * math.sqrt(len(asked) / 20)  # the whole range, evenly


@pytest.mark.parametrize("size", [3, 4, 5])
def test_every_order_of_a_few_windows_is_as_frequent(size):
    draws = [np.random.Philox(key=np.array([5, n], dtype=np.uint64)).random_raw(ROUNDS) for n in range(3000)]
    counts = Counter(tuple(permuted(numbers(size), size, keys).tolist()) for keys in draws)
    orders = math.factorial(size)
    assert len(counts) == orders
    chi_squared = sum((count - 3000 / orders) ** 2 for count in counts.values()) * orders / 3000
    assert chi_squared < orders - 1 + 5 * math.sqrt(2 * (orders - 1))


@pytest.mark.parametrize(
    ("count", "block_size"), [(2, 1), (3, 1), (9, 8), (15, 8), (16, 8), (17, 8), (24, 8), (31, 8), (101, 7), (1000, 13)]
)
def test_an_epoch_has_every_window_once_at_one_offset(count, block_size):
    per_epoch = max(1, count // block_size - 1)
    offsets, orders = set(), set()
    for epoch in range(200):
        starts = epoch_starts(count, block_size, 7, epoch * per_epoch, per_epoch).tolist()
        low = min(starts)
        assert sorted(starts) == [low + block_size * k for k in range(per_epoch)]
        assert low >= 0
        assert max(starts) + block_size < count  # the target of its last token is in the text
        offsets.add(low)
        orders.add(tuple((start - low) // block_size for start in starts))
    legal = range(count - per_epoch * block_size)
    assert offsets == set(legal)
    if per_epoch < 4 or per_epoch > 10:
        assert len(orders) == min(200, math.factorial(per_epoch))
    assert max(offsets) + per_epoch * block_size == count - 1  # no token is left out for good


def test_an_order_never_changes():
    """Pinned numbers: a run of an older version resumes with the same batches."""
    assert epoch_starts(1000, 64, 1337, 20, 8).tolist() == [522, 138, 586, 842, 202, 394, 714, 458]
    assert epoch_starts(2**46, 64, 2**63 - 1, 10**15, 2).tolist() == [10829363150488, 22142798704856]


def test_batches_are_the_windows_of_the_run_in_turn():
    """Steps of 10 windows through epochs of 3, of 9 and of 60: a batch begins and ends within epochs."""
    for count in (32, 80, 490):
        tokens = np.arange(count, dtype="<u2")
        starts = epoch_starts(count, 8, 1, 0, 200)
        batches = [batch_at(tokens, 1, step, 10, 8, order="epochs") for step in range(20)]
        assert np.concatenate([batch.x[:, 0] for batch in batches]).tolist() == starts.tolist()
        assert all(np.array_equal(batch.y, batch.x + 1) for batch in batches)


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_any_number_of_processes_takes_the_same_windows(processes):
    tokens = np.arange(490, dtype="<u2")
    whole = batch_at(tokens, 1, 5, 10, 8, order="epochs")
    share = 10 // processes
    rows = [slice(rank * share, (rank + 1) * share) for rank in range(processes)]
    parts = [batch_at(tokens, 1, 5, 10, 8, part, "epochs") for part in rows]
    for name in ("x", "y", "seeds"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
    assert np.array_equal(whole.seeds, batch_at(tokens, 1, 5, 10, 8).seeds)  # as with replacement


def test_other_seeds_and_epochs_have_other_orders():
    first, other, later = (epoch_starts(10**6, 8, seed, at, 5000) for seed, at in ((1, 0), (2, 0), (1, 124_999)))
    for starts in (other, later):
        assert np.mean(first // 8 == starts // 8) < 0.01


def test_the_keys_are_no_part_of_the_draws_of_a_step():
    key = np.array([1, 5], dtype=np.uint64)
    drawn = np.random.Philox(key=key).random_raw(10_000)
    assert not set(np.random.Philox(key=key, counter=EPOCH_STREAM).random_raw(1 + ROUNDS)) & set(drawn)


def test_a_run_reads_each_window_once_and_shows_it(here, losscurve):
    config = config_for(here, order="epochs", max_steps=8)
    run, _ = trained(config)
    tokens = open_data(here / "data", 16).train
    starts = epoch_starts(len(tokens), 16, config.seed, 0, 8 * SMALL["batch_size"])
    seen = [micro.x for step in range(8) for micro in run.parts.micro_batches(step)]
    assert [x[0].tolist() for x in seen] == [tokens[s : s + 16].tolist() for s in starts[:: SMALL["batch_size"]]]
    assert len(set(starts.tolist())) == 32
    code, out, err = losscurve("show-batch --step 3")
    assert code == 0, err
    shown = [part.partition(" ---\n")[2][:17] for part in out.split("--- step ")[1:]]
    assert shown == [run.parts.tokenizer.decode(tokens[s : s + 17].tolist()) for s in starts[8:12]]
    code, _, err = losscurve("train --resume --max_steps 9 --order replacement")
    assert (code, "order was 'epochs' in this run and cannot become 'replacement'" in err) == (2, True)
