"""Watching a QEMU of our own: its monitor, its guest's own time, its consoles, and the report when it fails."""
