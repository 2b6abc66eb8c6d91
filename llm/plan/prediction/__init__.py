"""The loss that a run for a given time should end with, predicted from its text and its FLOPs."""
