"""Disks that record, fail and lose power."""
