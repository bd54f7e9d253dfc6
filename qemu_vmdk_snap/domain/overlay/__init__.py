"""The next overlay of a disk: which one, its name, and creating it."""
