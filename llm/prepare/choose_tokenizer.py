"""Choose the tokenizer of a text: by its name, trained on the text, or another one as a suggestion."""

from collections.abc import Iterator
from typing import Any

from llm.errors import Failure, UserError
from llm.text.corpus import Corpus, Say, Survey, documents_between
from llm.tokens.bpe import BPE_VOCAB_SIZE, gpt2, train_bpe
from llm.tokens.tokenizer import Bytes, Tokenizer

MET = 10  # an id in use that occurs less often on average, in the training tokens, calls for a smaller vocabulary


SAMPLE = 64 * 2**20  # characters: a BPE is trained on no more, evenly spread over a larger text


def open_tokenizer(kind: str, source: Corpus, offline: bool, say: Say) -> Tokenizer | None:
    """Return the tokenizer if it needs no text, None if it is made from the text. `say` gets a line for a fallback.

    Raises:
        UserError: `kind` is "hf", the kind of a tokenizer that comes with weights.
        Failure: `kind` is "gpt2", and GPT-2's vocabulary cannot be downloaded.
    """
    if kind == "hf":
        raise UserError(
            "tokenizer = 'hf': is the tokenizer of a model to start from; give it with losscurve train --init_from"
        )
    if source.missing:
        chosen = "a bpe trained on them" if kind == "auto" else f"{kind} tokens"
        say(f"{source.missing}. Using the help topics that come with Python instead, with {chosen}")
        if kind == "auto":
            kind = "bpe"
    if kind == "auto":
        try:
            return gpt2(offline)
        except Failure as failure:
            say(f"{failure}. Using a bpe trained on the text instead")
            return None
    if kind == "gpt2":
        return gpt2(offline)
    return Bytes() if kind == "byte" else None


def train_tokenizer(
    source: Corpus, survey: Survey, train_characters: int, vocab_size: int | None, say: Say
) -> Tokenizer:
    """Train a BPE on the first `train_characters` of a text."""
    if train_characters > SAMPLE:
        say(f"training the bpe on {SAMPLE / 1e6:.0f} of {train_characters / 1e6:.0f} M characters, evenly spread")
    return train_bpe(_sample(source, survey, train_characters), vocab_size or BPE_VOCAB_SIZE)


def suggest_tokenizer(meta: dict[str, Any]) -> str | None:
    """Return a hint if "auto" chose GPT-2's tokens for a text that is too small for them, else None.

    An id that occurs fewer than MET times on average is hardly learned. In tiny Shakespeare an id occurs 25 times
    on average, in a text of 20 KB about 4 times.
    """
    tokens = meta["splits"]["train"]["tokens"]
    used = meta["vocab_used"]
    is_auto_gpt2 = meta["settings"]["tokenizer"] == "auto" and meta["tokenizer"]["kind"] == "gpt2"
    if not is_auto_gpt2 or tokens >= MET * used:
        return None
    return (
        f"{meta['source']['name']}: its text uses {used:,} of {meta['vocab_size']:,} ids, each fewer than {MET} times "
        f"on average; a small vocabulary suits it better: --tokenizer bpe --vocab_size 512, or --tokenizer char"
    )


def _sample(source: Corpus, survey: Survey, stop: int) -> Iterator[str]:
    """Yield the training text, or about SAMPLE characters of it in evenly spread chunks."""
    share = min(1.0, SAMPLE / stop)
    due = 0.0  # chunks to take, of those seen
    for _, chunks in documents_between(source, survey, 0, stop):
        for chunk in chunks:
            due += share
            if due >= 1:
                due -= 1
                yield chunk
