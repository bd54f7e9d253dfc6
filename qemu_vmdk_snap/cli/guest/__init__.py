"""The `guest` commands, one file each."""
