"""Parameters and FLOPs of a model, counted from its shape. The model is not built, and torch is not imported."""

from llm.config.recipe import GPTConfig


def _attention_weights(config: GPTConfig) -> int:
    """Return the weights of queries, keys and values, and of the projection of the output, in one block."""
    return 2 * config.n_embd * (config.n_head + config.kv_heads) * config.head_size


def _feed_forward_weights(config: GPTConfig) -> int:
    """Return the weights of the feed-forward linears of one block: up and down, and a llama's gate."""
    return (3 if config.arch == "llama" else 2) * config.n_embd * config.ffn_width


def count_attention_parameters(config: GPTConfig) -> int:
    """Return the parameters of the attention linears of one block, without its norms."""
    biases = 2 * (config.n_embd + config.kv_heads * config.head_size) if config.bias else 0
    return _attention_weights(config) + biases


def count_feed_forward_parameters(config: GPTConfig) -> int:
    """Return the parameters of the feed-forward linears of one block, without its norm."""
    biases = 0 if config.arch == "llama" else config.ffn_width + config.n_embd
    return _feed_forward_weights(config) + biases


def count_hidden_matrices(config: GPTConfig) -> int:
    """Return the parameters of the matrices of all blocks."""
    return config.n_layer * (_attention_weights(config) + _feed_forward_weights(config))


def matrix_shapes(config: GPTConfig) -> list[tuple[int, int]]:
    """Return (rows, columns) of the matrices of one block: queries, keys, values, and gate and up, each by itself."""
    width, queries, keys = config.n_embd, config.n_head * config.head_size, config.kv_heads * config.head_size
    attention = [(queries, width), (keys, width), (keys, width), (width, queries)]
    into_feed_forward = [(config.ffn_width, width)] * (2 if config.arch == "llama" else 1)
    return [*attention, *into_feed_forward, (width, config.ffn_width)]


def muon_flops(config: GPTConfig) -> float:
    """Return the floating-point operations of one update of all hidden matrices by Muon.

    Each of its three iterations makes three products for a matrix of r rows and c >= r columns: 2 r r c for its Gram
    matrix, 2 r r r for the square of that, 2 r r c for the new matrix.
    """
    sides = [sorted(shape) for shape in matrix_shapes(config)]
    return 3.0 * config.n_layer * sum(4 * r * r * c + 2 * r**3 for r, c in sides)


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

    6 for each weight that the token is multiplied with, and 12 for each layer, channel of its heads and position of its
    context (Chowdhery et al. 2022, appendix B). Embeddings are looked up, so they count only where the head multiplies
    with them.
    """
    width = config.n_embd
    weights = count_hidden_matrices(config) + config.vocab_size * width
    return 6.0 * weights + 12.0 * config.n_layer * config.n_head * config.head_size * config.block_size


def forward_flops_per_token(config: GPTConfig) -> float:
    """Return the floating-point operations of the forward pass alone for one token: a third of `flops_per_token`."""
    return flops_per_token(config) / 3
