"""The live page of `losscurve watch`: reading run folders as they grow, a server on loopback, and what it shows."""
