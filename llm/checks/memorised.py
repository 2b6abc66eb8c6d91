"""Memorised or learned: find the passages of a sample that occur verbatim in the training tokens.

Token ids are compared exactly; hashes only say where to compare. An end-of-text token is a token like any other.

S samples, T tokens of each, N training tokens, W = S * (T - n + 1) windows of n tokens in the samples.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from llm.arch import Model
from llm.data import TokenData
from llm.generate import generate, generators
from llm.run import Run
from llm.start.run_data import hashes_of, open_run_data
from llm.start.run_folder import Say
from llm.tokens.token_files import Tokens
from llm.tokens.tokenizer import Ids, Tokenizer

PIECE = 2**18  # training tokens that are hashed together: their hashes fit in a processor's cache

ODD = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: spreads small ids over all 64 bits

BASE = 0xD1342543DE82EF95  # of the polynomial; odd, so that no token is shifted out of the hash

SHIFT = np.uint64(64 - 17)  # keeps the upper 17 bits of a hash: a table with a byte for each fits in the cache too

Places = npt.NDArray[np.int64]


class Passage(NamedTuple):
    """A passage of a sample that occurs in the training tokens. Length 0: none does."""

    length: int  # tokens
    sample: int  # index of the sample
    start: int  # index of its first token in the sample
    place: int  # index of its first token in the training tokens


def share_seen(samples: Ids, tokens: Tokens, n: int) -> float | None:
    """Return the share of the windows of `n` tokens in `samples` (S, T) that occur in `tokens` (N,); None if T < n.

    Exact. O((N + W) log n) operations and O(PIECE + W n) memory, however large `tokens` is.
    """
    places = first_places(samples, tokens, n)
    return float((places >= 0).mean()) if places.size else None


def longest_seen(samples: Ids, tokens: Tokens) -> Passage:
    """Return the longest passage of any of `samples` (S, T) that occurs in `tokens` (N,).

    Of several that are equally long, it is one in the first piece of `tokens`.

    Exact. If a passage occurs in a piece, so do all its prefixes. So each piece is searched for one token more than the
    longest passage so far; if it has that, the length grows in doubling steps, then in halving ones. That is O(N log T)
    operations, and O(log² T) searches of the few pieces that hold a longer passage.
    """
    best = Passage(0, 0, 0, 0)
    overlap = samples.shape[1] - 1  # of two pieces, so that no passage is cut
    for begin in range(0, len(tokens), PIECE):
        piece = tokens[begin : begin + PIECE + overlap]
        step = 1
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
    """Return where each window of `n` tokens of `samples` (S, T) first occurs in `tokens` (N,): (S, T - n + 1).

    -1 where it does not.
    """
    S, T = samples.shape
    count = max(0, T - n + 1)
    flat = samples.reshape(-1)
    places = np.full(S * count, -1, dtype=np.int64)
    starts = (np.arange(S)[:, None] * T + np.arange(count)).reshape(-1)  # of each window in `flat`
    window_hashes = hashes(samples, n).reshape(-1)
    left = np.arange(len(starts))
    # One pass searches one window of each hash. Windows that differ from it, a collision, are left for another pass.
    while left.size:
        distinct, first, group = np.unique(window_hashes[left], return_index=True, return_inverse=True)
        searched = starts[left[first]]
        equal = _are_equal(flat, starts[left], flat, searched[group], n)
        places[left[equal]] = _search(distinct, flat, searched, tokens, n)[group[equal]]
        left = left[~equal]
    return places.reshape(S, count)


def _search(distinct: npt.NDArray[np.uint64], flat: Ids, searched: Places, tokens: Tokens, n: int) -> Places:
    """Return where the windows of `flat` that start at `searched` (U,) first occur in `tokens`, or -1: (U,).

    `distinct` (U,): their hashes, sorted, without duplicates.
    """
    places = np.full(len(distinct), -1, dtype=np.int64)
    may_match = np.zeros(2 ** (64 - int(SHIFT)), dtype=bool)
    may_match[distinct >> SHIFT] = True
    for begin in range(0, len(tokens) - n + 1, PIECE):
        piece = tokens[begin : begin + PIECE + n - 1]
        piece_hashes = hashes(piece, n)
        at = np.flatnonzero(may_match[piece_hashes >> SHIFT])
        which = np.searchsorted(distinct, piece_hashes[at]).clip(max=len(distinct) - 1)
        is_new_hit = (distinct[which] == piece_hashes[at]) & (places[which] < 0)
        at = at[is_new_hit]
        which = which[is_new_hit]
        equal = _are_equal(piece, at, flat, searched[which], n)
        which, first = np.unique(which[equal], return_index=True)
        places[which] = begin + at[equal][first]
    return places


def hashes(ids: Ids, n: int) -> npt.NDArray[np.uint64]:
    """Return a hash of every window of `n` >= 1 ids: (..., T) -> (..., T - n + 1).

    The hash is a polynomial modulo 2**64. Each is joined from the hashes of its two halves, which takes log2(n) to
    2 log2(n) multiplications per id.
    """
    if ids.shape[-1] < n:
        return np.zeros((*ids.shape[:-1], 0), dtype=np.uint64)
    if n == 1:
        return ids.astype(np.uint64) * np.uint64(ODD)
    half = n // 2
    half_hashes = hashes(ids, half)
    joined = half_hashes[..., :-half] * np.uint64(pow(BASE, half, 2**64)) + half_hashes[..., half:]
    if n % 2 == 0:
        return joined
    return joined[..., :-1] * np.uint64(BASE) + hashes(ids[..., n - 1 :], 1)


def _are_equal(a: Ids, a_starts: Places, b: Ids, b_starts: Places, n: int) -> npt.NDArray[np.bool_]:
    """Return whether the n ids of `a` from each of `a_starts` (K,) on equal those of `b` from `b_starts` (K,) on."""
    equal = np.ones(len(a_starts), dtype=bool)
    for offset in range(n):
        equal &= a[a_starts + offset] == b[b_starts + offset]
    return equal


def spread_windows(tokens: Tokens, count: int, length: int) -> Ids:
    """Return at most `count` windows of `length` tokens, evenly spread, without overlap: (S, T).

    If there are fewer than `length` tokens, the window is all of them.
    """
    length = min(length, len(tokens))
    whole_windows = len(tokens) // length
    count = min(count, whole_windows)
    starts = np.arange(count) * whole_windows // count * length
    return np.asarray(tokens[starts[:, None] + np.arange(length)])


def run_tokens(run: Run, data_dir: str | None = None, say: Say = lambda line: None) -> TokenData:
    """Return the token files that a run was trained on, from `data_dir` if it is given.

    Raises UserError if they are not found, or if they are not those of the run's env.json.
    """
    return open_run_data(run.path, run.config, hashes_of(run.path), data_dir, say)


def draw(
    model: Model,
    data: TokenData,
    tokenizer: Tokenizer | None,
    prompt: str,
    size: tuple[int, int],
    seed: int,
    temperature: float,
) -> Ids:
    """Draw samples of `size` (S, T) that continue `prompt`, and return them without it.

    Without a tokenizer, they continue the first token of the validation split.

    Raises UserError for a seed, a size or a temperature out of range.
    """
    device = next(model.parameters()).device
    samples, length = size
    generator = generators(seed, samples, device)
    prompt_ids = tokenizer.encode(prompt) if tokenizer else data.val[:1]
    vocab_size = tokenizer.vocab_size if tokenizer else data.vocab_size
    start = torch.from_numpy(prompt_ids.astype(np.int64)).to(device).expand(samples, -1)
    drawn = list(generate(model, start, length, temperature, generator=generator, vocab_size=vocab_size))
    return torch.stack(drawn, 1).cpu().numpy()
