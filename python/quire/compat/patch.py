"""x."""
patch = None
