"""Commands that check a machine, files or a resume."""
