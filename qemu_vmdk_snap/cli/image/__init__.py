"""The `image` commands, one file each."""
