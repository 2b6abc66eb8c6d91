"""The page of `--to html`: its scripts, its kernel, and what packs and reads the weights in it."""
