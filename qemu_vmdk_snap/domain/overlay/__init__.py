"""The overlay that a disk is to continue in: which one, its name, and making it."""
