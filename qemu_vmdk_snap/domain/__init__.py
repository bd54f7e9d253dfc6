"""The libvirt plugin: snapshots of the VMDK disks of domains, registered in libvirt's own metadata."""
