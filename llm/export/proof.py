"""The proof of an export: what reads it gives the run's token ids and the run's logits.

Shapes: N tokens, T tokens of a window, V vocabulary of the tokenizer.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.arch import Model
from llm.errors import UserError
from llm.export.source import Source
from llm.tokens.tokenizer import END_OF_TEXT, Tokenizer

LOGIT_TOKENS = 2048  # of the validation text whose logits are compared, about; as many of the hostile text
# The largest difference of a logit that another order of adding may make, as a share of the largest logit. 16 layers of
# a llama differ by 4e-6 from themselves in float64. The wrong GELU differs by 4e-4 after 200 steps on tiny Shakespeare.
FLOAT32_BOUND = 2e-5

# Texts that tokenizers disagree about: each is encoded alone, and all of them together
HOSTILE = (
    "",
    " ",
    "   leading and trailing spaces   ",
    "tab\tand\u00a0no-break\u2003em\u3000ideographic space",
    "line\nbreaks\r\nof\rall\n\n\nkinds\n \n\t\n",
    "a" + " " * 40 + "b" + "\n" * 12 + "c" + "\t" * 9 + "d",
    "I'm you're he'd we'll they've it's don't I'M IT'S ’s ''s 'sst",
    "0 7 42 123 1234 12345678901234567890 3.14159 1,000,000 ½ Ⅻ ٣٤ ४२",
    "CamelCase snake_case kebab-case SHOUTING sPoNgE x1y2z3",
    "for (int i = 0; i < n; ++i) { a[i] |= b->c * 0xFF; } // {{}} <<>> $@#%^&*~`\\",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa aaaa aaa aa a ======== ---------- ........ !!!!!!!",
    "café cafe\u0301 Å A\u030a ﬁ fi İı ǅ ẞß",
    "Привет, мир! Γειά σου שלום مرحبا नमस्ते สวัสดี 你好世界。こんにちは 안녕하세요",
    "👍 👍🏽 👨\u200d👩\u200d👧\u200d👦 🇨🇭 🏴\U000e0067\U000e0062 ❤️ ☃",
    "a \u0085b \ufeffc",  # white space: the first to Unicode only, the second to JavaScript only
    "zero\u200bwidth\u200d\u2060 \ufeffmark \u202ereversed\u202c soft\u00adhyphen",
    "control\x00\x01\x07\x1b[0m\x7f\x85 and \ufffd \U0010fffd \ue000",
    "Ġ Ċ ▁ ## ĠĠ ▁▁ <0x0A> Ã© â€™",
    f"{END_OF_TEXT} {END_OF_TEXT}{END_OF_TEXT} <|im_start|> <s> </s> <unk> [INST] [PAD] <pad>",
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\Windows\\System32",
    "no space at the end",
)


@dataclass(frozen=True)
class Reader:
    """What reads an export: its name, and the ids, text and logits (T, V or more) that it gives."""

    name: str
    encode: Callable[[str], Sequence[int]]
    decode: Callable[[list[int]], str]
    logits: Callable[[list[int]], Tensor]


def our_reader(name: str, model: Model, tokenizer: Tokenizer) -> Reader:
    """Return model and tokenizer of ours, as they were read back, as the reader of an export."""

    @torch.no_grad()
    def logits(ids: list[int]) -> Tensor:
        found: Tensor = model(torch.tensor([ids]))[0]
        return found[0]

    return Reader(name, lambda text: tokenizer.encode(text).tolist(), tokenizer.decode, logits)


@dataclass(frozen=True)
class Proof:
    """The figures of a comparison that found no mismatch. It prints as two lines."""

    reader: str  # what read the export, with its version
    validation_tokens: int  # encoded alike; 0: the run's token files were not there
    hostile_tokens: int
    positions: int  # whose logits were compared
    difference: float  # the largest of a logit from the run in float32, as a share of the largest logit
    bound: float  # of rounding_aside if that is known, else of difference
    loss: float | None  # the run's, in nats per token, on validation tokens; None without them
    export_loss: float | None  # the export's, on the same
    compared: str = "logits"
    rounding_aside: float | None = None  # as difference, from the run with its weights rounded as the export has them

    def __str__(self) -> str:
        texts = f"{self.hostile_tokens:,} of hostile text"
        if self.validation_tokens:
            texts = f"{self.validation_tokens:,} of validation text and {texts}"
        lines = [
            f"read back by {self.reader}: the same token ids ({texts})",
            f"{self.compared} at {self.positions:,} positions differ from the run's in float32 by at most "
            f"{self.difference:.1e} of the largest logit",
        ]
        if self.rounding_aside is not None:
            lines[1] += f", and from those of its weights rounded as here by {self.rounding_aside:.1e}"
        lines[1] += f" (bound {self.bound:.0e})"
        if self.loss is not None and self.export_loss is not None:
            lines[1] += f"; loss {self.loss:.4f} in the run, {self.export_loss:.4f} in the export"
        return "\n".join(lines)


def prove(
    source: Source,
    reader: str,
    encode: Callable[[str], Sequence[int]],
    logits: Callable[[list[int]], Tensor],
    bound: float = FLOAT32_BOUND,
    reference: Model | None = None,
    decode: Callable[[list[int]], str] | None = None,
) -> Proof:
    """Compare an export with its run, and return the figures.

    Args:
        reader: what reads the export, with its version.
        encode: returns the export's ids of a text. `<|endoftext|>` in it is ordinary text, as for our tokenizers.
        logits: returns the export's logits (T, V or more) of at most block_size ids (T,).
        bound: the largest difference of a logit that is allowed, as a share of the largest logit of its text.
        reference: the model to whose logits the bound applies, if not the run's own: for an export in fewer bits, the
            run's model with its weights rounded to these. The difference from the run's own is a figure of the proof
            too, and the losses compare with the run's own.
        decode: returns the export's text of ids, if it has a decoder of its own to compare.

    Raises:
        UserError: an id or a logit differs; the message says which.
    """
    tokenizer = source.tokenizer
    text = validation_text(source)
    validation_tokens = compare_ids(tokenizer, encode, decode, text) if text else 0
    hostile = hostile_texts(tokenizer)
    hostile_tokens = sum(compare_ids(tokenizer, encode, decode, words) for words in hostile)
    sums = _Sums()
    windows = list(_windows(source.validation, source.model.config.block_size))
    for ids in windows:
        sums.add(source, reference, ids, logits(ids), bound)
    loss = sums.losses()
    for ids in _windows(tokenizer.encode(hostile[-1]), source.model.config.block_size):
        sums.add(source, reference, ids, logits(ids), bound)
    aside = None if reference is None else sums.compared_difference
    figures = (sums.positions, sums.difference, bound, *loss)
    return Proof(reader, validation_tokens, hostile_tokens, *figures, rounding_aside=aside)


def validation_text(source: Source) -> str:
    """Return the text of the validation tokens, without end-of-text and without a character that is cut off."""
    ids = source.validation
    if source.tokenizer.end_of_text is not None:
        ids = ids[ids != source.tokenizer.end_of_text]
    return source.tokenizer.decode_bytes(ids).decode("utf-8", errors="ignore")


def hostile_texts(tokenizer: Tokenizer) -> list[str]:
    """Return the texts of HOSTILE and, as the last one, all of them joined: for `char`, of its characters only."""
    texts = [*HOSTILE, "".join(HOSTILE)]
    if tokenizer.kind != "char":
        return texts
    known = tokenizer.decode(range(tokenizer.vocab_size))
    kept = ["".join(character for character in text if character in known) for text in HOSTILE]
    return [*kept, "".join(kept) + known + known[::-1]]


def compare_ids(
    tokenizer: Tokenizer,
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[list[int]], str] | None,
    text: str,
) -> int:
    """Return the number of ids of `text`. Raises UserError if the export has others, or another text for them."""
    ours = tokenizer.encode(text).tolist()
    theirs = list(encode(text))
    if ours == theirs:
        if decode is not None and decode(ours) != tokenizer.decode(ours):
            raise UserError(
                f"the export does not decode as the run does: its text of the ids of {text[:40]!r} differs; "
                "nothing was written"
            )
        return len(ours)
    pairs = zip(ours, theirs, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    before = tokenizer.decode(ours[max(0, place - 4) : place])
    raise UserError(
        f"the export does not tokenize as the run does: after {before!r}, the run has {_named(tokenizer, ours, place)} "
        f"and the export {_named(tokenizer, theirs, place)}; nothing was written"
    )


def _named(tokenizer: Tokenizer, ids: list[int], place: int) -> str:
    """Return an id with its text, in words."""
    if place >= len(ids):
        return "no more tokens"
    return f"token {ids[place]} ({tokenizer.decode(ids[place : place + 1])!r})"


def _windows(ids: "np.ndarray[tuple[int], np.dtype[np.integer]]", block_size: int) -> Iterator[list[int]]:
    """Yield consecutive windows of at most `block_size` ids, of LOGIT_TOKENS ids or one window."""
    for start in range(0, min(len(ids), max(LOGIT_TOKENS, block_size)), block_size):
        yield ids[start : start + block_size].tolist()


def _largest_difference(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the largest difference of a logit (T, V) as a share of the largest expected one, and that one (or 1)."""
    scale = max(1.0, expected.abs().max().item())
    return (found - expected).abs().max().item() / scale, scale


class _Sums:
    """The comparison of logits so far."""

    def __init__(self) -> None:
        self.positions = 0
        self.difference = 0.0  # from the run in float32
        self.compared_difference = 0.0  # from the model to which the bound applies
        self._predicted = 0
        self._run_nats: list[float] = []
        self._export_nats: list[float] = []

    @torch.no_grad()
    def add(self, source: Source, reference: Model | None, ids: list[int], found: Tensor, bound: float) -> None:
        """Compare the logits `found` (T, V or more) of `ids` (T,). Raises UserError if one is beyond the bound."""
        V = source.tokenizer.vocab_size
        x = torch.tensor([ids])
        theirs = found.detach().float().cpu()[:, :V]
        ours = source.model(x)[0][0, :, :V].float()
        expected = ours if reference is None else reference(x)[0][0, :, :V].float()
        if theirs.shape != expected.shape:
            raise UserError(
                f"the export's logits are {tuple(theirs.shape)}, and the run's {tuple(expected.shape)}; "
                "nothing was written"
            )
        difference, scale = _largest_difference(theirs, expected)
        if not difference <= bound:  # NaN is beyond any bound
            raise UserError(
                f"the export's logits differ from the run's by {difference:.2g} of the largest one ({scale:.3g}), and "
                f"the bound is {bound:.2g}; nothing was written"
            )
        self.positions += len(ids)
        self.compared_difference = max(self.compared_difference, difference)
        self.difference = max(self.difference, _largest_difference(theirs, ours)[0])
        for nats, logits in ((self._run_nats, ours), (self._export_nats, theirs)):
            nats.append(F.cross_entropy(logits[:-1], x[0, 1:], reduction="sum").item() if len(ids) > 1 else 0.0)
        self._predicted += len(ids) - 1

    def losses(self) -> tuple[float | None, float | None]:
        """Return the losses of run and export in nats per token so far; None if nothing was predicted."""
        if self._predicted == 0:
            return None, None
        return math.fsum(self._run_nats) / self._predicted, math.fsum(self._export_nats) / self._predicted
