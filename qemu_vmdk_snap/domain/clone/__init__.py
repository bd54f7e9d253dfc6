"""Copying a domain: a new one on overlays of frozen files, or on copies."""
