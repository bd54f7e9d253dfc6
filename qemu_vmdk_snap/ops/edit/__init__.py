"""Changing images in place: merging, moving, resizing, removing."""
