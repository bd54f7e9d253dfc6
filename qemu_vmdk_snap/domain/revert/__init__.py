"""Reverting to a snapshot."""
