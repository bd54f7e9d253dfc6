"""Make an overlay empty again, in place: its chain then reads as the parent.

In place, since QEMU does not look at the name again when it has the lock of an image: with another file under the
name it would write to a deleted one. A new CID is durable first, so that an image that was backed by the overlay
no longer fits; an operation record lets `recover` finish what was interrupted. NumPy is not needed: a hook at a guest's
start must be fast.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from qemu_vmdk_snap.chain.identity import with_fresh_cid
from qemu_vmdk_snap.chain.links import LinkFacts, read_links
from qemu_vmdk_snap.chain.needs.dependents import (
    Census,
    require_nobody_new,
    require_one_name,
    require_unneeded,
    search_folders,
)
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.errors import InvalidRequest, Unsupported
from qemu_vmdk_snap.ops.journal.guard import guarded_operation
from qemu_vmdk_snap.ops.journal.recover import settle
from qemu_vmdk_snap.ops.journal.relink import DescriptorChange
from qemu_vmdk_snap.storage.blockfile import BlockFile, FileOpener, open_posix
from qemu_vmdk_snap.storage.journal.record import Operation
from qemu_vmdk_snap.storage.opening import open_locked
from qemu_vmdk_snap.units import SECTOR_SIZE
from qemu_vmdk_snap.vmdk.sparse.clear import clear_extent
from qemu_vmdk_snap.vmdk.sparse.header import SparseExtentHeader, check_header

OPERATION: Final = "renew"
_EMBEDDED: Final = "monolithicsparse"


class RenewReport(NamedTuple):
    """What was renewed."""

    path: Path
    parent: Path
    dropped_bytes: int
    """Its size on its file system before."""

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types."""
        return {"filename": str(self.path), "parent": str(self.parent), "dropped-bytes": self.dropped_bytes}


def renew_overlay(
    path: Path | str,
    *,
    trusted_dirs: Sequence[Path | str] = (),
    orphans: Sequence[Path | str] = (),
    opener: FileOpener = open_posix,
) -> RenewReport:
    """Empty the overlay `path`: it stores nothing any more and reads as its parent.

    Its dependents are looked for beside the links of the chain and in `trusted_dirs` themselves (not below); `orphans`
    are given up.

    Raises:
        InvalidRequest: it has no parent.
        StillNeeded: something else needs it, or may need it, and would lose its data.
        Unsupported: it does not consist of one file.
        LockBusy: a guest, or another program, has it open.
        CorruptChain, CidMismatch, FormatError: its chain is broken.
        OSError: a file cannot be read or written.
    """
    path = Path(os.path.realpath(path))  # a link at the path stays one
    find = confined([path.parent, *trusted_dirs])
    settle(path.parent, opener=opener, resolver=find)
    file = open_locked(path, opener, writable=True)  # nobody else, from before the check to the end
    try:
        links = read_links(path, trusted_dirs=trusted_dirs)
        top = links[0]
        if len(links) == 1:
            raise InvalidRequest(path, "has no parent: it is not an overlay")
        if top.create_type.lower() != _EMBEDDED or top.files != (path,):
            raise Unsupported(path, f"only an overlay in one file can be renewed, not one of type {top.create_type}")
        census = Census.of(search_folders([link.path for link in links], find))
        given_up = [Path(one) for one in orphans]
        require_unneeded(path, [path], census, orphans=given_up)
        require_one_name(path, [path], census, orphans=given_up)
        dropped = path.stat().st_blocks * 512  # 512 bytes on every file system
        _run(file, top, lambda: require_nobody_new(path, [path], census))
        return RenewReport(path, links[1].path, dropped)
    finally:
        file.close()


def finish_renew(record: Operation, opener: FileOpener) -> None:
    """Finish what another process began: emptying the overlay."""
    change = DescriptorChange.from_detail(record.details["change"])
    file = open_locked(record.image, opener, writable=True)
    try:
        change.write(file)
        clear_extent(file, _header(file))
    finally:
        file.close()


def _run(file: BlockFile, top: LinkFacts, still: Callable[[], None]) -> None:
    header = _header(file)  # refuses before anything is recorded
    fresh = with_fresh_cid(top.descriptor)
    change = DescriptorChange(top.path, fresh.base, top.descriptor.raw, fresh.raw)
    record = guarded_operation(OPERATION, top.path, [], {"change": change.as_detail()})
    with record.hold:
        record.begin_if(still)
        change.write(file)
        clear_extent(file, header)
        record.end()


def _header(file: BlockFile) -> SparseExtentHeader:
    header = SparseExtentHeader.parse(file.read_at(0, SECTOR_SIZE), path=file.path)
    check_header(header, file.path, file.size())
    return header
