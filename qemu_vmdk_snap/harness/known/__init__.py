"""Known content: what was written to a disk, chains that remember it, and guests that are held to it."""
