"""The commands on a whole domain with all its files."""
