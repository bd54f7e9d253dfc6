"""Freeing the space after the last part in use, which an interrupted operation has left."""

from __future__ import annotations

import contextlib

from qemu_vmdk_snap.chain.link import Link
from qemu_vmdk_snap.errors import FormatError
from qemu_vmdk_snap.ops.check.findings import Findings
from qemu_vmdk_snap.ops.check.tables import audit_tables
from qemu_vmdk_snap.units import round_up, sector_bytes
from qemu_vmdk_snap.vmdk.sparse.extent import SparseExtent


def trim_link(link: Link) -> int:
    """Cut the extents of a link open for writing after their last grain in use; return the bytes freed.

    Tables that were changed in memory and not stored are ignored: what only they name is cut off.
    """
    given = 0
    for placed in link.extents:
        extent = placed.extent
        if not isinstance(extent, SparseExtent):
            continue
        if not extent.tables.dirty:
            # What only one copy of the tables names is in use, too.
            with contextlib.suppress(FormatError):
                extent.settle_copies()
        header, file = extent.header, extent.file
        audit = audit_tables(file, header, Findings(), lambda _: None)
        end = max(round_up(audit.end, sector_bytes(header.grain_size)), sector_bytes(header.overhead))
        if end < file.size():
            given += file.size() - end
            extent.cut(end)
    return given
