"""The table of the modules that read each extent type.

To add a kind: write one module with `open_extent` (see `vmdk.extent`), and name it here under the word that its extent
lines have in a descriptor.
"""

from __future__ import annotations

from qemu_vmdk_snap.light import Final

MODULES: Final[dict[str, str]] = {
    "SPARSE": "qemu_vmdk_snap.vmdk.by_magic",
    "FLAT": "qemu_vmdk_snap.vmdk.flat.extent",
    "ZERO": "qemu_vmdk_snap.vmdk.zero",
    "VMFS": "qemu_vmdk_snap.vmdk.flat.extent",
    "VMFSSPARSE": "qemu_vmdk_snap.vmdk.by_magic",
    "VMFSRDM": "qemu_vmdk_snap.vmdk.flat.device",
    "VMFSRAW": "qemu_vmdk_snap.vmdk.flat.device",
    "SESPARSE": "qemu_vmdk_snap.vmdk.sesparse",
}
"""Extent type of the descriptor -> the module whose `open_extent` opens it."""
