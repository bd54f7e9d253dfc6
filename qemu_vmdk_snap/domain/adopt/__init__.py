"""Registering snapshots that others have made."""
