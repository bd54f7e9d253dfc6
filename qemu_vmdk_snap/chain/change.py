"""The one way to open images for an operation that changes them.

What can be known before the first change is found out here: that the name leads to the file that is locked, that no
interrupted operation waits on any link, that a flat extent is as long as its descriptor says, and that the two copies
of the grain tables agree. An entry that only one copy has is what a power cut between the two leaves; it is stored in
the other copy first, so that nothing which a repair would bring back is lost with the image. Copies that contradict
each other are refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from qemu_vmdk_snap.chain.chain import Chain, open_links
from qemu_vmdk_snap.chain.link import Link, open_link
from qemu_vmdk_snap.chain.resolver import Resolver
from qemu_vmdk_snap.errors import FormatError
from qemu_vmdk_snap.storage.blockfile import FileOpener, open_posix
from qemu_vmdk_snap.storage.journal.record import refuse_pending
from qemu_vmdk_snap.units import SECTOR_SIZE, sector_bytes

_FLAT: Final = ("FLAT", "VMFS")


@runtime_checkable
class TwoCopies(Protocol):
    """An extent that keeps its tables twice."""

    def settle_copies(self) -> int:
        """Store in each copy what only the other has; return how many entries. Raises FormatError where they clash."""


def open_for_change(
    path: Path,
    *,
    depths: Collection[int],
    resolver: Resolver,
    opener: FileOpener = open_posix,
    check_cids: bool = True,
) -> Chain:
    """Open a chain for an operation that writes or deletes its links at `depths`; those are held for writing.

    Raises:
        CorruptChain: an operation on one of the links has begun and not ended, or the chain cannot be followed.
        FormatError: a link is damaged: repair it first.
        LockBusy, CidMismatch, Unsupported, OSError: see `open_chain`.
    """
    chain = open_links(path, writable_depths=depths, resolver=resolver, opener=opener, check_cids=check_cids)
    try:
        refuse_pending(*(file.path for link in chain.links for file in link.files))
        for depth in depths:
            if depth < chain.depth:
                _require_sound(chain.links[depth])
    except BaseException:
        chain.close()
        raise
    return chain


def open_link_for_change(
    path: Path, *, resolver: Resolver, opener: FileOpener, stack: contextlib.ExitStack, owner: Path | None = None
) -> Link:
    """Open one image for writing, without its parents, until `stack` closes; checked as `open_for_change` does."""
    link = open_link(path, opener=opener, writable=True, resolver=resolver, owner=owner)
    stack.callback(link.close)
    refuse_pending(*(file.path for file in link.files))
    _require_sound(link)
    return link


def _require_sound(link: Link) -> None:
    for line, placed in zip(link.descriptor.extents, link.extents, strict=False):
        file = placed.extent.file
        if file is None:
            continue
        if line.type in _FLAT and file.size() < sector_bytes(line.offset + line.sectors):
            rule = f"must fit into {file.path}, which has {file.size() // SECTOR_SIZE} sectors: it was cut short"
            raise FormatError(link.path, line.at, "extent sectors", line.offset + line.sectors, rule)
        if isinstance(placed.extent, TwoCopies):
            placed.extent.settle_copies()
