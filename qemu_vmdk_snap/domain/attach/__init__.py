"""How a disk is attached: direct, by QEMU's own vmdk driver, or served by a server of ours."""
