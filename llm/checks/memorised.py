"""Memorised or learned: which passages of a sample stand in the training tokens word for word.

Everything compares token ids exactly; hashes only say where to look. An end-of-text token is a token like another.

S samples, T tokens of each, N training tokens, W = S * (T - n + 1) windows of n tokens in the samples.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from llm import storage
from llm.data import TokenData
from llm.errors import UserError
from llm.generate import generate, generators
from llm.model import GPT
from llm.run import Run
from llm.start.run_data import Say, open_run_data
from llm.tokens.token_files import Tokens
from llm.tokens.tokenizer import Ids, Tokenizer

PIECE = 2**18  # training tokens looked at together: their hashes stay in a processor's cache


ODD = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: spreads small ids over all 64 bits


BASE = 0xD1342543DE82EF95  # of the polynomial, odd, so that no token is shifted out of it


SHIFT = np.uint64(64 - 17)  # the upper 17 bits of a hash, for a table of a byte each that stays in the cache too


Places = npt.NDArray[np.int64]


class Passage(NamedTuple):
    """A stretch of a sample that stands in the training tokens; length 0: none."""

    length: int  # tokens
    sample: int  # which sample
    start: int  # its first token in the sample
    place: int  # its first token in the training tokens


def share_seen(samples: Ids, tokens: Tokens, n: int) -> float | None:
    """The share of the windows of `n` tokens in `samples` (S, T) that stand in `tokens` (N,); None if T < n.

    Exact. O((N + W) log n) operations and O(PIECE + W n) memory, however large `tokens` is.
    """
    places = first_places(samples, tokens, n)
    return float((places >= 0).mean()) if places.size else None


def longest_seen(samples: Ids, tokens: Tokens) -> Passage:
    """The longest stretch of any of `samples` (S, T) that stands in `tokens` (N,); of equals, one in the first piece.

    Exact. A stretch that stands there has all its beginnings there, so each piece is asked for one token more than
    the longest so far, and where it has that, for more in doubling and halving steps: O(N log T) operations, and
    O(log² T) looks at those few pieces that hold a longer one.
    """
    best, width = Passage(0, 0, 0, 0), samples.shape[1]
    for begin in range(0, len(tokens), PIECE):
        piece, step = tokens[begin : begin + PIECE + width - 1], 1
        while step:
            places = first_places(samples, piece, best.length + step)
            if not (places >= 0).any():
                step //= 2
                continue
            sample, start = divmod(int(np.argmax(places >= 0)), places.shape[1])
            best = Passage(best.length + step, sample, start, begin + int(places[sample, start]))
            step *= 2
    return best


def first_places(samples: Ids, tokens: Tokens, n: int) -> Places:
    """Where each window of `n` tokens of `samples` (S, T) first stands in `tokens` (N,): (S, T - n + 1), or -1."""
    S, T = samples.shape
    count = max(0, T - n + 1)
    flat, places = samples.reshape(-1), np.full(S * count, -1, dtype=np.int64)
    starts = (np.arange(S)[:, None] * T + np.arange(count)).reshape(-1)  # of each window in `flat`
    own = hashes(samples, n).reshape(-1)
    left = np.arange(len(starts))
    while left.size:  # once; again only for windows that share a hash with another and are not the same
        known, first, which = np.unique(own[left], return_index=True, return_inverse=True)
        chosen = starts[left[first]]
        same = _same(flat, starts[left], flat, chosen[which], n)
        places[left[same]] = _scan(known, flat, chosen, tokens, n)[which[same]]
        left = left[~same]
    return places.reshape(S, count)


def _scan(known: npt.NDArray[np.uint64], flat: Ids, chosen: Places, tokens: Tokens, n: int) -> Places:
    """Where the windows of `flat` that start at `chosen` (U,) first stand in `tokens`, or -1; their hashes `known`
    (U,) are sorted, each there once."""
    places = np.full(len(known), -1, dtype=np.int64)
    table = np.zeros(2 ** (64 - int(SHIFT)), dtype=bool)
    table[known >> SHIFT] = True
    for begin in range(0, len(tokens) - n + 1, PIECE):
        piece = tokens[begin : begin + PIECE + n - 1]
        found = hashes(piece, n)
        at = np.flatnonzero(table[found >> SHIFT])
        which = np.searchsorted(known, found[at]).clip(max=len(known) - 1)
        hit = (known[which] == found[at]) & (places[which] < 0)
        at, which = at[hit], which[hit]
        same = _same(piece, at, flat, chosen[which], n)
        which, first = np.unique(which[same], return_index=True)
        places[which] = begin + at[same][first]
    return places


def hashes(ids: Ids, n: int) -> npt.NDArray[np.uint64]:
    """A hash of every window of `n` >= 1 ids, (..., T) -> (..., T - n + 1): a polynomial modulo 2**64, each hash
    joined from those of its two halves, so log2(n) to 2 log2(n) multiplications an id."""
    if ids.shape[-1] < n:
        return np.zeros((*ids.shape[:-1], 0), dtype=np.uint64)
    if n == 1:
        return ids.astype(np.uint64) * np.uint64(ODD)
    half = n // 2
    part = hashes(ids, half)
    joined = part[..., :-half] * np.uint64(pow(BASE, half, 2**64)) + part[..., half:]
    return joined if n % 2 == 0 else joined[..., :-1] * np.uint64(BASE) + hashes(ids[..., n - 1 :], 1)


def _same(a: Ids, at: Places, b: Ids, to: Places, n: int) -> npt.NDArray[np.bool_]:
    """Whether the n ids of `a` from `at` (K,) on are those of `b` from `to` (K,) on: (K,)."""
    same = np.ones(len(at), dtype=bool)
    for offset in range(n):
        same &= a[at + offset] == b[to + offset]
    return same


def spread_windows(tokens: Tokens, count: int, length: int) -> Ids:
    """At most `count` windows of `length` tokens (of all, if there are fewer), evenly spread and apart: (S, T)."""
    length = min(length, len(tokens))
    full = len(tokens) // length
    count = min(count, full)
    return np.asarray(tokens[(np.arange(count) * full // count * length)[:, None] + np.arange(length)])


def run_tokens(run: Run, data_dir: str | None = None, say: Say = lambda line: None) -> TokenData:
    """The token files that a run was trained on, looked for in `data_dir` where it is given.

    Raises UserError where they are not there, or are not those of the run's env.json.
    """
    try:
        written = storage.read_json(run.path / "env.json")
    except UserError:  # a run whose env.json was lost: nothing to compare with
        written = None
    expected = written.get("data") if isinstance(written, dict) else None
    return open_run_data(run.path, run.config, expected if isinstance(expected, dict) else None, data_dir, say)


def draw(
    model: GPT, data: TokenData, tokenizer: Tokenizer | None, prompt: str, size: tuple[int, int], seed: int, heat: float
) -> Ids:
    """Samples of `size` (S, T) at temperature `heat` that continue `prompt`, which is no part of them; without a
    tokenizer they continue the first token of the validation split. Raises UserError for what is out of its range."""
    device = next(model.parameters()).device
    luck = generators(seed, size[0], device)
    ids = tokenizer.encode(prompt) if tokenizer else data.val[:1]
    start = torch.from_numpy(ids.astype(np.int64)).to(device).expand(size[0], -1)
    vocab_size = tokenizer.vocab_size if tokenizer else data.vocab_size
    drawn = list(generate(model, start, size[1], heat, generator=luck, vocab_size=vocab_size))
    return torch.stack(drawn, 1).cpu().numpy()
