"""Hosted sparse extents (`KDMV`): header, tables, grains."""
