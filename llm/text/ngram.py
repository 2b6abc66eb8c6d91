"""The cross-entropy of a text under counts of its n-grams: how well its next byte can be told without a model.

N bytes of counted text, M bytes that are predicted.
"""

import numpy as np
import numpy.typing as npt

ORDER = 6  # bytes before the predicted one; with it, they fill 7 of the 8 bytes of a key
COUNTED = 2**22  # bytes: of more text, so many are counted, in chunks that are evenly spread
TESTED = 2**18  # bytes that are predicted, in the same way
CHUNKS = 64

Keys = npt.NDArray[np.uint64]


def cross_entropy(train: bytes, validated: bytes) -> float:
    """Return bits per byte of `validated` under the counts of `train`; both have more than ORDER bytes.

    After a context of k bytes that was followed n times by d different bytes, c times by this one, its probability is
    (c + d q) / (n + d), where q is its probability after k - 1 bytes (Witten & Bell 1991, method C); 1/256 without
    any context. This goes on up to ORDER bytes. A context that was never met changes nothing.
    """
    counted = np.sort(_keys(_spread(train, COUNTED)))
    tested = _keys(_spread(validated, TESTED))
    probability = np.full(len(tested), 1 / 256)
    for order in range(ORDER + 1):
        _refine(probability, counted, tested, order)
    return float(-np.log2(probability).mean())


def _refine(probability: npt.NDArray[np.float64], counted: Keys, tested: Keys, order: int) -> None:
    """Update `probability` (M,) by the counts after `order` bytes.

    A key begins with its earliest byte, so that `counted` (N,), sorted, has equal beginnings side by side.
    """
    grams = counted >> np.uint64(8 * (ORDER - order))
    contexts = grams >> np.uint64(8)
    place = np.argsort(_end(tested, order + 1))  # a search for sorted keys is several times faster
    gram = _end(tested, order + 1)[place]
    context = gram >> np.uint64(8)
    times = np.searchsorted(grams, gram, "right") - np.searchsorted(grams, gram, "left")
    first = np.searchsorted(contexts, context, "left")
    last = np.searchsorted(contexts, context, "right")
    met = last > first
    kinds = np.zeros(len(grams) + 1, np.int64)  # distinct grams among the first ones
    np.cumsum(np.concatenate(([True], grams[1:] != grams[:-1])), out=kinds[1:])
    different = kinds[last] - kinds[first]
    total = np.maximum(last - first + different, 1)
    lower = probability[place]
    probability[place] = np.where(met, (times + different * lower) / total, lower)


def _keys(text: bytes) -> Keys:
    """Return a number for each ORDER + 1 bytes of a text, the earliest byte highest."""
    numbers = np.frombuffer(text, np.uint8)
    count = len(numbers) - ORDER
    keys = np.zeros(count, np.uint64)
    for offset in range(ORDER + 1):
        keys = keys << np.uint64(8) | numbers[offset : offset + count]
    return keys


def _end(keys: Keys, count: int) -> Keys:
    """Return the last `count` bytes of each key."""
    return keys & np.uint64(2 ** (8 * count) - 1)


def _spread(text: bytes, most: int) -> bytes:
    """Return at most `most` bytes of a text, in CHUNKS that are evenly spread over it."""
    if len(text) <= most:
        return text
    size = most // CHUNKS
    starts = [number * (len(text) - size) // (CHUNKS - 1) for number in range(CHUNKS)]
    return b"".join(text[start : start + size] for start in starts)
