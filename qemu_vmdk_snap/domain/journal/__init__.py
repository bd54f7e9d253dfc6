"""Unfinished changes of a domain's snapshots: the record, and how it is finished or undone."""
