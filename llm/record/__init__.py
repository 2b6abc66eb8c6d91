"""The outputs of a run: metrics, samples, pictures, verdicts, trackers."""
