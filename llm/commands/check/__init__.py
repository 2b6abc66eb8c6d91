"""Commands that check a machine, files, or that resuming works."""
