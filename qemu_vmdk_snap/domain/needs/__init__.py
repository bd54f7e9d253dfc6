"""Who still needs a file: what libvirt names, what nothing needs any more, and the files that a revert discards."""
