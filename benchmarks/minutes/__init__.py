"""Bits per byte against minutes: the runs behind the rule of `train --time`, and their picture."""
