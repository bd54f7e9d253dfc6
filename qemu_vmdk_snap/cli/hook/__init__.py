"""The `hook` commands, one file each."""
