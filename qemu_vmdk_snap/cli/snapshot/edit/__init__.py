"""The commands that change libvirt's metadata of a snapshot."""
