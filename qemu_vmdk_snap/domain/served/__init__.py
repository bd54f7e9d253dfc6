"""Disks that a server of ours serves: where, by whom, and how commands speak to it."""
