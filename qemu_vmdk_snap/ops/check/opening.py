"""How a repair, and undoing it, opens a file that it writes and reads its descriptor."""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.errors import FormatError
from qemu_vmdk_snap.storage.blockfile import BlockFile, FileOpener
from qemu_vmdk_snap.storage.opening import open_locked
from qemu_vmdk_snap.units import SECTOR_SIZE, sector_bytes
from qemu_vmdk_snap.vmdk.cowd.header import COWD_MAGIC, legacy_descriptor, read_cowd_header
from qemu_vmdk_snap.vmdk.descriptor import MAX_BYTES, Descriptor
from qemu_vmdk_snap.vmdk.sparse.header import MAGIC, SparseExtentHeader


def open_file_for_change(path: Path, opener: FileOpener, *, writable: bool = True) -> BlockFile:
    """Return the file, open and locked as QEMU locks it; read-only unless `writable` is set.

    Raises:
        LockBusy: another process has it open.
        OSError: it cannot be opened.
    """
    return open_locked(path, opener, writable=writable)


def descriptor_of(file: BlockFile) -> Descriptor:
    """Return the descriptor of an image, whatever else is wrong with its header.

    Raises:
        FormatError: there is none: the file is an extent, or not a descriptor.
    """
    raw = file.read_at(0, SECTOR_SIZE)
    if raw[:4] == COWD_MAGIC:
        return legacy_descriptor(read_cowd_header(file, file.path), file.path)
    if raw[:4] != MAGIC:
        return Descriptor.parse(file.read_at(0, MAX_BYTES), path=file.path)
    header = SparseExtentHeader.parse(raw, path=file.path)
    if not header.descriptor_offset:
        raise FormatError(file.path, header.offset_of("descriptor_offset"), "descriptor_offset", 0, "must not be 0")
    base = sector_bytes(header.descriptor_offset)
    raw = file.read_at(base, min(MAX_BYTES, sector_bytes(header.descriptor_size)))
    return Descriptor.parse(raw, path=file.path, base=base)
