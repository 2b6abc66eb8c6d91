"""What surrounds the loop: evaluating, recording, saving, rolling back."""
