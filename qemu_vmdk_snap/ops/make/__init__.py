"""New images."""
