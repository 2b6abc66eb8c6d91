"""Parameters and FLOPs of a `GPT`, counted from its shape. The model is not built, and torch is not imported."""

from llm.config.recipe import GPTConfig


def count_attention_parameters(config: GPTConfig) -> int:
    """Return the parameters of the attention linears of one block, without its layer norm."""
    weights = 4 * config.n_embd**2  # queries, keys, values, and the projection of the output
    biases = 4 * config.n_embd if config.bias else 0
    return weights + biases


def count_feed_forward_parameters(config: GPTConfig) -> int:
    """Return the parameters of the feed-forward linears of one block, without its layer norm."""
    hidden = config.ffn_mult * config.n_embd
    weights = 2 * config.n_embd * hidden
    biases = hidden + config.n_embd
    return weights + biases


def count_parameters_by_part(config: GPTConfig) -> dict[str, int]:
    """Return the parameters of each part of the model. The final layer norm counts with the blocks.

    A tied head has none of its own.
    """
    layer_norm = 2 * config.n_embd
    block = count_attention_parameters(config) + count_feed_forward_parameters(config) + 2 * layer_norm
    return {
        "embedding": config.vocab_size * config.n_embd,
        "positions": config.block_size * config.n_embd,
        "blocks": config.n_layer * block + layer_norm,
        "head": 0 if config.tied_lm_head else config.vocab_size * config.n_embd,
    }


def count_parameters(config: GPTConfig) -> int:
    """Return the parameters of the whole model."""
    return sum(count_parameters_by_part(config).values())


def flops_per_token(config: GPTConfig) -> float:
    """Return the floating-point operations of the forward and backward pass for one token.

    6 for each weight that the token is multiplied with, and 12 for each layer, channel and position of its context
    (Chowdhery et al. 2022, appendix B). Embeddings are looked up, so they count only where the head multiplies with
    them.
    """
    width = config.n_embd
    block_weights = (4 + 2 * config.ffn_mult) * width**2
    weights = config.n_layer * block_weights + config.vocab_size * width
    return 6.0 * weights + 12.0 * config.n_layer * width * config.block_size
