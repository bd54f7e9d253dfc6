"""Undefining a domain, and deleting every file that is its alone."""
