"""A run in one piece, to share."""
