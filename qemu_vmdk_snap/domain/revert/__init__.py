"""Going back to a snapshot."""
