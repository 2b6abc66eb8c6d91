"""The machine: device and precision, the processes of a run, and the C kernel."""
