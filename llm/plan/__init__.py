"""Memory, time and cost of a run before its first step."""
