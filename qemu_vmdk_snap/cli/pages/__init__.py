"""Completion scripts and manual pages, made from the table of commands."""
