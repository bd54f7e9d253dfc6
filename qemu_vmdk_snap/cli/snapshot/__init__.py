"""The `snapshot` commands, one file each."""
