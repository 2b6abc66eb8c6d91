"""Tokenizers, and the files of token ids that a text is prepared into."""
