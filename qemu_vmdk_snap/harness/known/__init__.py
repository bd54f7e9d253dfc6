"""Known content: what was written to a disk, and guests that are held to it."""
