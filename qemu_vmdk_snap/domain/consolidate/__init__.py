"""Merging the links of a chain that no snapshot has."""
