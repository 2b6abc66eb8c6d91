"""The work around the training loop: evaluate, record, save, roll back."""
