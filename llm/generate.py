"""Continue a prompt, one token at a time with a key/value cache.

The order of the knobs is that of transformers: repetition penalty, temperature, top-k, top-p, min-p.

B samples, T tokens so far, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from llm.arch import Model
from llm.errors import UserError
from llm.model import KVCache
from llm.tokens.tokenizer import Tokenizer, encode_prompt
from llm.tokens.writing import Writing

LIKELIEST = 1024  # tokens that top-p looks at before it sorts them all
GROUP = 64  # neighbours whose maximum stands for them in `largest`
SAMPLES = 2**16  # maximum number of samples drawn together
BLOCK = 256  # rows of the output matrix in one product, see `last_logits`


class Knobs(TypedDict, total=False):
    """How a token is drawn from the logits. What is not given is off."""

    temperature: float  # 0 is greedy; default 1
    top_k: int | None  # draw from the k most likely tokens only
    top_p: float  # draw from the most likely tokens whose probabilities add up to this
    min_p: float  # draw no token below this share of the likeliest's probability
    repetition_penalty: float  # above 1: tokens of the prompt and after it are less likely


def next_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Return the probabilities (B, V) of the next token from logits (B, V).

    The usual order: logits / temperature, then only the `top_k` largest, then the smallest set of most likely
    tokens whose probabilities add up to `top_p` (Holtzman et al. 2020), then those that have at least `min_p` times the
    probability of the likeliest (Nguyen et al. 2024), renormalised. Temperature 0 is greedy: the largest logit has
    probability 1.
    """
    probabilities, ids = candidates(logits, temperature, top_k, top_p, min_p)
    return (
        probabilities if ids is None else torch.zeros_like(logits, dtype=torch.float32).scatter_(1, ids, probabilities)
    )


def tokens_in(ids: Tensor, V: int) -> Tensor:
    """Return which of V tokens occur in each row of ids (B, T): (B, V)."""
    return torch.zeros(len(ids), V, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits (B, V) with those of tokens that are `seen` (B, V) made smaller: divided by `penalty` where they
    are positive, else multiplied by it (Keskar et al. 2019)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def candidates(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float, min_p: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Return the probabilities (B, K) and ids (B, K) of the tokens that may be drawn; ids None: all, in order."""
    probabilities, ids = _likeliest(logits, temperature, top_k, top_p)
    if min_p > 0:
        too_small = probabilities < min_p * probabilities.amax(1, keepdim=True)
        probabilities = probabilities.masked_fill(too_small, 0.0)
        probabilities = probabilities / probabilities.sum(1, keepdim=True)
    return probabilities, ids


def _likeliest(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> tuple[Tensor, Tensor | None]:
    """Return what `candidates` does, without min-p."""
    logits, ids = logits.float(), None
    if temperature == 0:
        ids = logits.argmax(1, keepdim=True)
        return torch.ones_like(ids, dtype=torch.float32), ids
    if top_k is not None and top_k < logits.size(1):  # the same before the temperature as after it
        logits, ids = largest(logits, top_k)
    # the largest at 0, so that a tiny temperature cannot overflow; in float32, 1e-300 would be 0 and 1e300 infinite
    temperature = min(max(temperature, torch.finfo(torch.float32).tiny), torch.finfo(torch.float32).max)
    logits = (logits - logits.amax(1, keepdim=True)) / temperature
    probabilities = torch.softmax(logits, 1)
    if top_p == 1:
        return probabilities, ids
    count = probabilities.size(1)
    for size in (min(LIKELIEST, count), count):
        likely, order = probabilities.topk(size, dim=1)
        before = likely.cumsum(1) - likely  # probability of all that are likelier
        if size == count or bool((before[:, -1] >= top_p).all()):
            break
    beyond = before >= top_p
    beyond[:, 0] = False  # the likeliest stays, also where float32 holds no number as small as `top_p`
    likely = likely.masked_fill(beyond, 0.0)
    return likely / likely.sum(1, keepdim=True), order if ids is None else ids.gather(1, order)


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the `k` largest values of each row of x (B, V) in descending order, and their indices.

    The result is that of `topk`, except for the order of equal values. The k largest values are in the k groups with
    the largest maxima, so far fewer values have to be sorted.
    """
    groups = x.size(1) // GROUP
    if k >= groups:
        return x.topk(k, dim=1)
    whole = x[:, : groups * GROUP].view(len(x), groups, GROUP)
    chosen = whole.amax(2).topk(k, dim=1).indices
    places = (chosen[:, :, None] * GROUP + torch.arange(GROUP, device=x.device)).flatten(1)
    rest = torch.arange(groups * GROUP, x.size(1), device=x.device).expand(len(x), -1)
    places = torch.cat([places, rest], 1)
    found, at = x.gather(1, places).topk(k, dim=1)
    return found, places.gather(1, at)


def last_logits(model: Model, hidden: Tensor) -> Tensor:
    """Return the logits (B, V) of the last position of `hidden` (B, T, C).

    The product of the output matrix and a few vectors is limited by memory bandwidth. In float32 on a CPU, PyTorch
    uses all cores for it only if it is a batch of products.
    """
    last, weight = hidden[:, -1], model.lm_head.weight
    V, C = weight.shape
    if last.device.type != "cpu" or last.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or V < BLOCK:
        return model.lm_head(last)  # type: ignore[no-any-return]
    whole = V // BLOCK * BLOCK
    blocks, vectors, logits = weight[:whole].view(-1, BLOCK, C), last.t(), last.new_empty(V, len(last))
    torch.bmm(blocks, vectors.expand(len(blocks), -1, -1), out=logits[:whole].view(len(blocks), BLOCK, -1))
    torch.mm(weight[whole:], vectors, out=logits[whole:])
    return logits.t().contiguous()


def check_knobs(
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> None:
    """Raise UserError that names the first argument out of its range."""
    for name, value, good, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "0 or more"),
        ("temperature", temperature, math.isfinite(temperature) and temperature >= 0, "0 or more"),
        ("top_k", top_k, top_k is None or top_k >= 1, "1 or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("min_p", min_p, 0 <= min_p <= 1, "0 to 1"),
        ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < math.inf, "above 0; 1 is none"),
    ):
        if not good:
            raise UserError(f"{name} = {value!r}: expected {expected}")


def check_stop(stop: str | Sequence[str]) -> Sequence[str]:
    """Return the texts that end a continuation; one may come by itself. Raises UserError for an empty one."""
    texts = [stop] if isinstance(stop, str) else stop
    if "" in texts:
        raise UserError("stop = '': expected at least one character")
    return texts


@torch.no_grad()
def generate(
    model: Model,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    vocab_size: int | None = None,
    *,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Iterator[Tensor]:
    """Yield the next token ids (B,) of each row of `prompt` (B, T), `max_new_tokens` times.

    The context is the last block_size tokens, as in the chapter. With a key/value cache, a new token costs one position
    of work. Once the window of a `GPT` slides, each token has another learned position, so all is computed again; a
    `Llama` keeps its cache (`cache_slides`). Ids from `vocab_size` on (padding of the vocabulary) are never drawn. With
    one `generator` for each row, the draws of a row do not depend on the other rows. The repetition penalty is for all
    tokens of the prompt and after it, also for those that have left the context. The model is put into evaluation mode.

    Raises UserError if an argument is out of its range.
    """
    check_knobs(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty)
    if prompt.size(1) == 0:
        raise UserError("prompt: holds no token; give at least one character")
    model.eval()
    limit = model.config.block_size
    context = prompt[:, -limit:]
    cache = KVCache(model.config, prompt.size(0), prompt.device, _dtype(model))
    new = context
    seen = tokens_in(prompt, model.config.vocab_size) if repetition_penalty != 1 else None
    for _ in range(max_new_tokens):
        fits = model.cache_slides or cache.length + new.size(1) <= limit
        hidden = model.hidden(new, cache) if fits else model.hidden(context)
        logits = last_logits(model, hidden)[:, :vocab_size]
        if seen is not None:
            logits = penalise(logits, seen[:, :vocab_size], repetition_penalty)
        probabilities, ids = candidates(logits, temperature, top_k, top_p, min_p)
        if ids is None or ids.size(1) > 1:
            drawn = draw(probabilities, generator)
            new = drawn if ids is None else ids.gather(1, drawn)
        else:  # nothing to draw
            new = ids
        yield new[:, 0]
        context = torch.cat([context, new], 1)[:, -limit:]
        if seen is not None:
            seen.scatter_(1, new, True)


def draw(probabilities: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
    """Draw an index (B, 1) from each row of `probabilities` (B, K), with one generator or with one for each row."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.multinomial(probabilities, 1, generator=generator)
    rows = zip(probabilities, generator, strict=True)
    return torch.stack([torch.multinomial(row, 1, generator=own) for row, own in rows])


def generators(seed: int | None, count: int, device: torch.device) -> list[torch.Generator]:
    """Return a generator for each of `count` samples, seeded by `seed` and the number of the sample only.

    The first is seeded with `seed` itself. Without a seed they differ from call to call. Raises UserError.
    """
    if seed is not None and not 0 <= seed < 2**63:
        raise UserError(f"seed = {seed!r}: expected a whole number from 0 to {2**63 - 1}")
    if not 1 <= count <= SAMPLES:
        raise UserError(f"num_samples = {count}: expected 1 to {SAMPLES:,}")
    made = [torch.Generator(device) for _ in range(count)]
    for number, generator in enumerate(made):
        if seed is None:
            generator.seed()
        elif number == 0:
            generator.manual_seed(seed)
        else:
            generator.manual_seed(int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]))
    return made


def _dtype(model: Model) -> torch.dtype:
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return model.wte.weight.dtype


def continue_text(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    seed: int | None = None,
    num_samples: int = 1,
    **knobs: Unpack[Knobs],
) -> Iterator[list[int]]:
    """Yield the next token id of each of `num_samples` continuations of `prompt`, `max_new_tokens` times.

    With a `seed`, the continuations are the same every time, and each is the same for any `num_samples`. Raises
    UserError for an argument out of its range, and for a prompt that is empty or cannot be encoded.
    """
    device = next(model.parameters()).device
    own = generators(seed, num_samples, device)
    ids = torch.from_numpy(encode_prompt(tokenizer, prompt).astype(np.int64)).to(device).expand(num_samples, -1)
    tokens = generate(model, ids, max_new_tokens, generator=own, vocab_size=tokenizer.vocab_size, **knobs)
    return (token.tolist() for token in tokens)


def write(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    seed: int | None = None,
    num_samples: int = 1,
    stop: str | Sequence[str] = (),
    ignore_end: bool = False,
    **knobs: Unpack[Knobs],
) -> Iterator[list[str]]:
    """Yield the text that each token adds to each of `num_samples` continuations of `prompt`, until all have ended.

    A continuation ends before the first of the texts `stop`, at end-of-text unless `ignore_end`, or after
    `max_new_tokens`. The pieces of one, joined, are its text. The rest is as in `continue_text`.
    """
    tokens = continue_text(model, tokenizer, prompt, max_new_tokens, seed, num_samples, **knobs)
    writings = [Writing(tokenizer, check_stop(stop), ignore_end) for _ in range(num_samples)]
    return _pieces(tokens, writings)


def _pieces(tokens: Iterator[list[int]], writings: list[Writing]) -> Iterator[list[str]]:
    for row in tokens:
        yield [writing.add(token) for writing, token in zip(writings, row, strict=True)]
        if all(writing.ended for writing in writings):
            return
    yield [writing.rest() for writing in writings]
