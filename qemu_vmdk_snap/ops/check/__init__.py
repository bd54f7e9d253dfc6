"""Checking images, and repairing them."""
