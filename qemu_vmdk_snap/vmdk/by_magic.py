"""The extents called SPARSE and VMFSSPARSE: the file itself says which of three kinds it is.

QEMU accepts a COWD file with the type SPARSE, which VMware's old products wrote; a hosted sparse extent may be
compressed.
"""

from __future__ import annotations

from qemu_vmdk_snap.errors import FormatError
from qemu_vmdk_snap.vmdk import shortfall
from qemu_vmdk_snap.vmdk.extent import Extent, ExtentSpec


def open_extent(spec: ExtentSpec) -> Extent:
    """Open a hosted sparse extent, plain or compressed (streamOptimized), or a COWD extent.

    Raises:
        FormatError: the header, or what it names, is invalid.
        Unsupported: write access to version 3, or to a compressed extent.
    """
    file = spec.file
    if file is None:
        raise FormatError(spec.path, spec.line.at, "extent", spec.line.type, "must name a file")
    if file.read_at(0, 4) == b"COWD":
        from qemu_vmdk_snap.vmdk.cowd import extent as cowd

        return cowd.open_extent(spec)
    from qemu_vmdk_snap.vmdk.sparse.extent import open_sparse, read_header

    header = read_header(file, spec.path, tolerant=not spec.writable)
    if header.compressed:
        from qemu_vmdk_snap.vmdk.stream import extent as stream

        return stream.open_stream(spec, file, header)
    extent = open_sparse(spec, file, header)
    extent.notes.merge(shortfall.of_sparse(spec.path, file.size(), header.overhead, header.offset_of("overhead")))
    return extent
