"""The merges of a BPE, for programs that want pairs where ours has a list of tokens."""

from llm.tokens.bpe import BPE, to_printable


def merges(tokenizer: BPE) -> list[tuple[str, str]]:
    """Return the pairs of tokens that a BPE merges, the first to be merged first, in GPT-2's printable alphabet.

    Our BPE merges any two neighbours that form a token, the lowest id first; so every way to cut a token into two
    others is a merge, with the rank of the token.
    """
    tokens = tokenizer.tokens[:-1]  # without end-of-text
    rank = {token: i for i, token in enumerate(tokens)}
    pairs: list[tuple[bytes, bytes]] = []
    for token in tokens:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(left, right) for left, right in cuts if left in rank and right in rank]
        pairs += sorted(known, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    left, right = ([pair[side] for pair in pairs] for side in (0, 1))
    return list(zip(to_printable(left), to_printable(right), strict=True))
