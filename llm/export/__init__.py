"""Exports: a run in the format of another program, proved by reading it back."""
