"""What a run was trained on, and how much of that it writes word for word."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from llm.checks.memorised import draw, longest_seen, share_seen, spread_windows
from llm.data import TokenData
from llm.errors import UserError
from llm.machine.device import choose_device, choose_dtype, precision
from llm.record.chart_style import plain
from llm.report.facts import Card, Frequency, Memory, Seen
from llm.report.words import PASSAGE, VISIBLE, shown, visible, without_folders
from llm.run import Run
from llm.tokens.token_files import Tokens, read_meta
from llm.tokens.tokenizer import Ids, Tokenizer

TOKENS = 12  # most and least frequent ones shown


COUNTED = 2**27  # training tokens counted; of more, evenly spread pieces


PIECE = 2**20


TEMPERATURES = (0.5, 0.8, 1.0)


N = 8  # tokens in a row: few enough to occur, enough to be rare by chance


DRAWN = 2000  # tokens drawn at each temperature


QUICK = 10**8  # training tokens; to look through more takes longer than a report should


def card_of(run: Run, data: TokenData | str, tokenizer: Tokenizer | None, trouble: list[str]) -> Card:
    """Sizes, tokenizer, most and least frequent tokens."""
    kinds = {"gpt2": "GPT-2's BPE", "bpe": "a BPE trained on the text", "byte": "bytes", "char": "characters"}
    kind = f"{kinds[tokenizer.kind]}, {tokenizer.vocab_size:,} tokens" if tokenizer else "not known: ids only"
    facts = [("tokenizer", kind)]
    if isinstance(data, str):
        return Card(facts, "; ".join([data, *trouble]))
    facts = [("text", plain(data.source, 60)), *facts]
    facts += [("training tokens", f"{len(data.train):,}"), ("validation tokens", f"{len(data.val):,}")]
    counts, counted = count(data.train, max(data.vocab_size, run.config.model.vocab_size))
    order = np.argsort(-counts, kind="stable")
    used = order[counts[order] > 0]

    def listed(ids: npt.NDArray[Any]) -> list[Frequency]:
        return [Frequency(shown(i, tokenizer), i, int(counts[i]), float(counts[i] / counted)) for i in ids.tolist()]

    vocabulary = tokenizer.vocab_size if tokenizer else data.vocab_size
    entropy = -math.fsum(p * math.log(p) for p in (counts[used] / counted).tolist())
    facts += [("vocabulary found in the training text", f"{len(used):,} of {vocabulary:,}")]
    facts += [("entropy of the token frequencies", f"{entropy:.3f} nats"), *prepared(data)]
    least = used[::-1][: min(TOKENS, max(0, len(used) - TOKENS))]
    return Card(
        facts,
        "; ".join(trouble) or None,
        listed(used[:TOKENS]),
        listed(least),
        max(0, vocabulary - len(used)),
        counted,
        None if data.foreign else data.source,
        len(data.train),
    )


def prepared(data: TokenData) -> list[tuple[str, str]]:
    """What meta.json tells of the text, as far as it does."""
    meta = read_meta(data.folder)
    if meta is None:
        return [("origin", "not known: the token files came without a meta.json")]
    source, splits = meta["source"], meta["splits"]
    facts = [(what, source.get(what)) for what in ("documents", "characters", "bytes")]
    facts += [("bytes per training token", _ratio(splits["train"].get("bytes"), len(data.train)))]
    named = [(what, f"{n:,}" if type(n) is int else f"{n:.2f}") for what, n in facts if type(n) in (int, float)]
    return named + (
        [("SHA-256 of the text", plain(source["sha256"], 80))] if isinstance(source.get("sha256"), str) else []
    )


def _ratio(size: Any, tokens: int) -> float | None:
    return size / tokens if type(size) is int else None


def count(tokens: Tokens, vocab_size: int) -> tuple[npt.NDArray[np.int64], int]:
    """How often each id stands in `tokens` (N,): counts (V,), and how many tokens were counted.

    All of them up to COUNTED; beyond, about as many, in evenly spread pieces.
    """
    counts, counted = np.zeros(vocab_size, np.int64), 0
    starts = range(0, len(tokens), PIECE)
    for start in starts[:: math.ceil(len(starts) * PIECE / (COUNTED + PIECE))]:
        piece = tokens[start : start + PIECE]
        counts += np.bincount(piece, minlength=vocab_size)
        counted += len(piece)
    return counts, counted


def memory_of(run: Run, data: TokenData | str, tokenizer: Tokenizer | None) -> Memory | str:
    """Samples of the best weights (else of the last) looked for in the training text; or why that was not done."""
    if isinstance(data, str):
        return f"Not looked for: {data}"
    if len(data.train) > QUICK:
        return f"Not looked for: {len(data.train):,} training tokens take a while; losscurve memorised does it."
    file = next((name for name in ("best.pt", "model.pt") if (run.path / name).is_file()), None)
    if file is None:
        return "Not looked for: no weights are saved yet."
    try:
        model, prompt = run.model("best" if file == "best.pt" else "last"), run.config.sample_prompt or "\n"
        begin = len(tokenizer.encode(prompt)) if tokenizer else 1
    except UserError as error:
        return f"Not looked for: {without_folders(str(error), run)}"
    length = min(200, max(32, run.config.model.block_size - begin))  # within the context, where drawing is fast
    size, device, found = (math.ceil(DRAWN / length), length), choose_device("auto"), []
    for heat in TEMPERATURES:
        with precision(choose_dtype("auto", device), device):
            samples = draw(model, data, tokenizer, prompt, size, run.config.seed, heat)
        found.append(seen(f"temperature {heat:g}", samples, data.train, tokenizer))
    usual = spread_windows(data.val, *size)
    found.append(seen("validation text", usual, data.train, tokenizer))
    return Memory(file, size[0] * size[1], found)


def seen(what: str, samples: Ids, tokens: Tokens, tokenizer: Tokenizer | None) -> Seen:
    """Share and longest passage of `samples` (S, T) that stand in `tokens` (N,)."""
    share, longest = share_seen(samples, tokens, N), longest_seen(samples, tokens)
    ids = tokens[longest.place : longest.place + longest.length]
    text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids.tolist()))
    line = visible(text[:PASSAGE]).replace("\n", VISIBLE["\n"])
    return Seen(what, share, longest.length, line + ("…" if len(text) > PASSAGE else ""))
