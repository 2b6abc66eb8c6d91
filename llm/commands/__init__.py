"""One file per command: read the flags, call the library, print the result. No other package imports this one."""
