"""The machine: device and precision, the processes of a run, the C kernel."""
