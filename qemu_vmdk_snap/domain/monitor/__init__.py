"""Figures about domains, their snapshots and disks, for monitoring."""
