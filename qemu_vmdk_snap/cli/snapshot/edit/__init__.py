"""The commands that change what libvirt has registered of a snapshot."""
