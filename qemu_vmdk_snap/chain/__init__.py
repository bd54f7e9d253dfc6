"""The backing chain: find the parents, check that they may be trusted, map, read, and copy on write."""
