"""Raw device mappings of ESXi (VMFSRDM, VMFSRAW): a flat extent whose file is a block device.

On ESXi the line names a mapping file that only its kernel can follow. Elsewhere only a line that names the device
itself can be opened, and only if the caller allows devices.
"""

from __future__ import annotations

import stat

from qemu_vmdk_snap.errors import FormatError, Unsupported
from qemu_vmdk_snap.units import sector_bytes
from qemu_vmdk_snap.vmdk.extent import ExtentSpec
from qemu_vmdk_snap.vmdk.flat.extent import FlatExtent


def open_extent(spec: ExtentSpec) -> FlatExtent:
    """Open a device extent.

    Raises:
        Unsupported: the file is not a block device: a mapping that only ESXi can follow.
    """
    if spec.file is None:
        raise FormatError(spec.path, spec.line.at, "extent", spec.line.type, "must name a file")
    if not stat.S_ISBLK(spec.path.stat().st_mode):
        raise Unsupported(spec.path, f"a raw device mapping ({spec.line.type}) can be followed by ESXi alone")
    return FlatExtent(spec.file, spec.path, 0, sector_bytes(spec.line.sectors), writable=spec.writable)
