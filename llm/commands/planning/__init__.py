"""`plan`: what a run will take, here or on many accelerators."""
