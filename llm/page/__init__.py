"""The live page of `losscurve watch`: follow run folders, and serve them on loopback."""
