"""The commands that change an image."""
