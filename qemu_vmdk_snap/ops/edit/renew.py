"""Make an overlay empty again, in place: its chain then shows what the parent holds.

In place, since QEMU does not look at the name again when it has the lock of an image: another file under the name would
let it write into one that nobody finds again. A new CID is durable first, so that whoever was backed by the overlay
learns of it; an operation record lets `recover` finish what was interrupted.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qemu_vmdk_snap.chain.change import open_for_change
from qemu_vmdk_snap.chain.dependents import Census, require_one_name, require_unneeded, search_folders
from qemu_vmdk_snap.chain.identity import with_fresh_cid
from qemu_vmdk_snap.chain.link import open_link
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.errors import InvalidRequest, Unsupported
from qemu_vmdk_snap.ops.copy.transfer import Clearable
from qemu_vmdk_snap.ops.journal.guard import folders_of, guarded_operation
from qemu_vmdk_snap.ops.journal.recover import settle
from qemu_vmdk_snap.ops.journal.relink import DescriptorChange
from qemu_vmdk_snap.storage.blockfile import FileOpener, open_posix
from qemu_vmdk_snap.storage.record import Operation

OPERATION: Final = "renew"


@dataclass(frozen=True, slots=True)
class RenewReport:
    """What was renewed."""

    path: Path
    parent: Path
    dropped_bytes: int
    """What the overlay took up on its file system before."""


def renew_overlay(
    path: Path | str,
    *,
    trusted_dirs: Sequence[Path | str] = (),
    orphans: Sequence[Path | str] = (),
    opener: FileOpener = open_posix,
) -> RenewReport:
    """Empty the overlay `path`: it stores nothing any more and reads as its parent does.

    Its dependents are looked for beside the links of the chain and in `trusted_dirs` themselves (not below); `orphans`
    are given up.

    Raises:
        InvalidRequest: it has no parent.
        StillNeeded: something else needs it, or may need it, and would lose its data.
        Unsupported: it is of a kind that cannot be emptied.
        LockBusy: a guest, or another program, has it open.
        CorruptChain, CidMismatch, FormatError: its chain does not hold together.
        OSError: a file cannot be read or written.
    """
    path = Path(os.path.realpath(path))
    find = confined([path.parent, *trusted_dirs])
    settle(path.parent, opener=opener, resolver=find)
    with contextlib.ExitStack() as stack:
        chain = stack.enter_context(open_for_change(path, depths=[0], resolver=find, opener=opener))
        top = chain.links[0]
        if chain.depth == 1:
            raise InvalidRequest(path, "has no parent to go back to: it is no overlay")
        if not all(isinstance(placed.extent, Clearable) for placed in top.extents):
            raise Unsupported(path, f"an overlay of type {top.descriptor.create_type} cannot be emptied")
        files = [file.path for file in top.files]
        census = Census.of(search_folders([link.path for link in chain.links], find))
        given_up = [Path(one) for one in orphans]
        require_unneeded(path, files, census, orphans=given_up)
        require_one_name(path, files, census, orphans=given_up)
        dropped = sum(os.stat(file).st_blocks * 512 for file in files)  # noqa: PTH116 - 512 bytes on every file system
        change = DescriptorChange.plan(top, with_fresh_cid(top.descriptor))
        record = guarded_operation(OPERATION, path, files, {"change": change.as_detail()})
        with record.hold:
            record.begin()
            change.apply(top)
            for placed in top.extents:
                assert isinstance(placed.extent, Clearable)
                placed.extent.clear()
            record.end()
        return RenewReport(path, chain.links[1].path, dropped)


def finish_renew(record: Operation, opener: FileOpener) -> None:
    """Finish what somebody else began: the overlay is to be empty."""
    DescriptorChange.from_detail(record.details["change"]).redo(opener)
    link = open_link(record.image, opener=opener, writable=True, resolver=confined(folders_of(record)))
    try:
        for placed in link.extents:
            if isinstance(placed.extent, Clearable):
                placed.extent.clear()
    finally:
        link.close()
