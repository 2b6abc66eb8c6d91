"""Text to token files: on all cores, interrupted and resumed, shared by runs that start together."""
