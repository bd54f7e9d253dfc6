"""Registering snapshots that other programs have made."""
