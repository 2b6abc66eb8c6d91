"""Parameters and FLOPs of a model, counted from its shape. The model is not built, and torch is not imported."""

from llm.config.recipe import GPTConfig


def count_attention_parameters(config: GPTConfig) -> int:
    """Return the parameters of the attention linears of one block, without its norms."""
    keys_and_values = 2 * config.kv_heads * config.head_size
    outputs = config.n_embd + keys_and_values  # of the linear of queries, keys and values
    weights = config.n_embd * (outputs + config.n_embd)
    biases = outputs + config.n_embd if config.bias else 0
    return weights + biases


def count_feed_forward_parameters(config: GPTConfig) -> int:
    """Return the parameters of the feed-forward linears of one block, without its norm."""
    if config.arch == "llama":  # gate, up and down
        return 3 * config.n_embd * config.ffn_width
    weights = 2 * config.n_embd * config.ffn_width
    biases = config.ffn_width + config.n_embd
    return weights + biases


def count_hidden_matrices(config: GPTConfig) -> int:
    """Return the parameters of the matrices of all blocks."""
    width = config.n_embd
    attention = 2 * width * (width + config.kv_heads * config.head_size)
    feed_forward = (3 if config.arch == "llama" else 2) * width * config.ffn_width
    return config.n_layer * (attention + feed_forward)


def count_parameters_by_part(config: GPTConfig) -> dict[str, int]:
    """Return the parameters of each part of the model. The final norm counts with the blocks.

    A tied head has none of its own, and positions by rotation have none.
    """
    is_llama = config.arch == "llama"
    norm = config.n_embd if is_llama else 2 * config.n_embd
    norms = 2 * norm + (2 * config.head_size if is_llama and config.qk_norm else 0)
    block = count_attention_parameters(config) + count_feed_forward_parameters(config) + norms
    return {
        "embedding": config.vocab_size * config.n_embd,
        "positions": 0 if is_llama else config.block_size * config.n_embd,
        "blocks": config.n_layer * block + norm,
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
    weights = count_hidden_matrices(config) + config.vocab_size * width
    return 6.0 * weights + 12.0 * config.n_layer * width * config.block_size
