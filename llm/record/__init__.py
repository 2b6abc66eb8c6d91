"""What a run leaves to look at: metrics, samples, pictures, verdicts, trackers."""
