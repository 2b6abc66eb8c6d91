"""The data card of a report: what a run was trained on."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from llm.data import TokenData
from llm.record.chart_style import plain
from llm.report.facts import DataCard, Frequency
from llm.report.words import format_token
from llm.run import Run
from llm.tokens.token_files import Tokens, read_meta
from llm.tokens.tokenizer import Tokenizer

TOKENS = 12  # most frequent and least frequent ones listed, each
COUNTED = 2**27  # training tokens counted, about; beyond that, evenly spaced pieces of PIECE tokens
PIECE = 2**20

KINDS = {
    "gpt2": "GPT-2's BPE",
    "bpe": "a BPE trained on the text",
    "byte": "bytes",
    "char": "characters",
    "hf": "that of other weights",
}


def make_card(run: Run, data: TokenData | str, tokenizer: Tokenizer | None, trouble: list[str]) -> DataCard:
    """Return sizes, tokenizer, and the most and least frequent tokens.

    Args:
        data: the run's token files, or why they could not be read.
        trouble: further problems to report.
    """
    kind = f"{KINDS[tokenizer.kind]}, {tokenizer.vocab_size:,} tokens" if tokenizer else "unknown: ids only"
    facts = [("tokenizer", kind)]
    if isinstance(data, str):
        return DataCard(facts, trouble="; ".join([data, *trouble]))

    counts, counted = count(data.train, max(data.vocab_size, run.config.model.vocab_size))
    by_frequency = np.argsort(-counts, kind="stable")
    used = by_frequency[counts[by_frequency] > 0]
    vocabulary = tokenizer.vocab_size if tokenizer else data.vocab_size
    entropy = -math.fsum(p * math.log(p) for p in (counts[used] / counted).tolist())

    def frequencies(ids: Iterable[int]) -> list[Frequency]:
        return [Frequency(format_token(i, tokenizer), i, int(counts[i]), float(counts[i] / counted)) for i in ids]

    least = used[::-1][: min(TOKENS, max(0, len(used) - TOKENS))]
    return DataCard(
        facts=[
            ("text", plain(data.source, 60)),
            *facts,
            ("training tokens", f"{len(data.train):,}"),
            ("validation tokens", f"{len(data.val):,}"),
            ("vocabulary found in the training text", f"{len(used):,} of {vocabulary:,}"),
            ("entropy of the token frequencies", f"{entropy:.3f} nats"),
            *describe_source(data),
        ],
        trouble="; ".join(trouble) or None,
        most=frequencies(used[:TOKENS].tolist()),
        least=frequencies(least.tolist()),
        unseen=max(0, vocabulary - len(used)),
        counted=counted,
        source=None if data.foreign else data.source,
        train_tokens=len(data.train),
    )


def describe_source(data: TokenData) -> list[tuple[str, str]]:
    """Return what meta.json says about the text, as names and values in words."""
    meta = read_meta(data.folder)
    if meta is None:
        return [("origin", "unknown: the token files have no meta.json")]
    source = meta["source"]
    train_bytes = meta["splits"]["train"].get("bytes")
    numbers: list[tuple[str, Any]] = [(name, source.get(name)) for name in ("documents", "characters", "bytes")]
    if type(train_bytes) is int:
        numbers.append(("bytes per training token", train_bytes / len(data.train)))
    found = []
    for name, value in numbers:
        if type(value) is int:
            found.append((name, f"{value:,}"))
        elif type(value) is float:
            found.append((name, f"{value:.2f}"))
    if isinstance(source.get("sha256"), str):
        found.append(("SHA-256 of the text", plain(source["sha256"], 80)))
    return found


def count(tokens: Tokens, vocab_size: int) -> tuple[npt.NDArray[np.int64], int]:
    """Count how often each id occurs in `tokens` (N,); return the counts (V,) and the number of tokens counted.

    All tokens are counted up to COUNTED; of more, about as many, in evenly spaced pieces.
    """
    counts = np.zeros(vocab_size, np.int64)
    counted = 0
    starts = range(0, len(tokens), PIECE)
    stride = math.ceil(len(starts) * PIECE / (COUNTED + PIECE))
    for start in starts[::stride]:
        piece = tokens[start : start + PIECE]
        counts += np.bincount(piece, minlength=vocab_size)
        counted += len(piece)
    return counts, counted
