"""Interrupted operations: the content of their records, and how they are finished."""
