"""The commands that show snapshots."""
