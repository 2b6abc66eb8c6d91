"""Experiments: compare runs, and tell a difference from chance."""
