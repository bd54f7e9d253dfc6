"""Flat extents: the bytes of the disk themselves, in a file or on a device."""
