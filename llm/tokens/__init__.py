"""How text becomes tokens, and the files that hold them."""
