"""`plan`: predict the memory, time and cost of a run, here or on many accelerators."""
