"""One file per command: flags in, library calls, words out. Nothing in the library imports this package."""
