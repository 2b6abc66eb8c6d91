"""Whether the machine, the files and a resumed run are what they should be."""
