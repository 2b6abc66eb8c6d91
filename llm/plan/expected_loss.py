"""The loss that a run promises, from parameters, tokens and text. It ranks the shapes of a run for a given time."""

import math


def expected_loss(blocks: float, tokens: float, text: float) -> float:
    """Return the loss that the scaling law of Muennighoff et al. (2023) predicts, in nats per token.

    It is the part of the loss above the entropy of the text. The law was fitted to far larger models, on other texts
    and tokens, so its level means nothing here: use it only to rank two models.

    Args:
        blocks: parameters of the blocks
        tokens: tokens of training
        text: distinct tokens of the text that they are drawn from
    """
    fresh = min(text, tokens)
    optimal = min(blocks, 0.051 * fresh)  # the compute-optimal parameters for `fresh` tokens
    # a repeated token is worth less than a new one, and so is a parameter beyond the optimal ones
    effective_tokens = fresh * (1 + 15.4 * -math.expm1(-(tokens / fresh - 1) / 15.4))
    effective_size = optimal * (1 + 5.3 * -math.expm1(-(blocks / optimal - 1) / 5.3))
    return float(521 / effective_size**0.353 + 1488 / effective_tokens**0.353)
