"""Interrupted operations: what their records hold, and how they are finished."""
