"""Reports: a run in one file, to share."""
