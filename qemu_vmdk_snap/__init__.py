"""Snapshots of VMDK disks under QEMU and libvirt, proven by booting a guest on them."""
__version__ = "0.1.0"
