"""Is the host fit, and do a domain's files, XML, registry and QEMU agree? What does not is named, and repaired."""
