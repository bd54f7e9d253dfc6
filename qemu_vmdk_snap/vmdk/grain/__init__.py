"""Shared by all kinds of extents with grains: tables, reading, copy-on-write, filling a new one."""
