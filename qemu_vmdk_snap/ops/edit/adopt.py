"""Name the grains that a killed server stored and acknowledged, and did not live to name (storage.journal.grainlog)."""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap import log
from qemu_vmdk_snap.chain.link import Link, open_link
from qemu_vmdk_snap.chain.resolver import Resolver
from qemu_vmdk_snap.errors import CorruptChain
from qemu_vmdk_snap.ops.edit.trim import trim_link
from qemu_vmdk_snap.storage.journal.grainlog import GrainLog, Noted, taken
from qemu_vmdk_snap.units import sector_bytes
from qemu_vmdk_snap.vmdk.grain.extent import GTE_ZEROED, GrainExtent

_log = log.of(__name__)


def adopt(image: Path, resolver: Resolver) -> int:
    """Name the grains that wait for the image, durably, and cut off what nothing names; return how many there were.

    Raises:
        CorruptChain: the image was written since by somebody else; its log is gone, as is what it names.
        LockBusy: another process has the image open.
        FormatError, Unsupported, OSError: it cannot be read or written.
    """
    link = open_link(image, writable=True, resolver=resolver)
    try:
        left = taken(image)  # with the image locked: nobody writes it, and nobody else adopts
        if left is None:
            return 0
        try:
            count = _adopt(link, left)
            left.remove()
        finally:
            left.close()
        trim_link(link)
        return count
    finally:
        link.close()


def _adopt(link: Link, left: GrainLog) -> int:
    path = Path(link.path)
    if left.cid != link.cid:
        left.remove()
        reason = f"was written (CID {link.cid:08x}, not {left.cid:08x}) after its server was killed"
        raise CorruptChain(path, f"{reason}: what the server had acknowledged and not flushed is lost")
    notes = list(left.notes())
    named = {(note.extent, note.grain): note.sector for note in notes}
    for (number, grain), sector in named.items():
        if not _fits(link, Noted(number, grain, sector)):
            left.remove()
            raise CorruptChain(path, f"grain {grain} was changed after its server was killed: its log is ignored")
    for (number, grain), sector in named.items():
        extent = link.extents[number].extent
        assert isinstance(extent, GrainExtent)
        extent.adopt_entry(grain, sector)
    link.flush()
    _log.info("%s: %d grains of a killed server named", path, len(named))
    return len(named)


def _fits(link: Link, note: Noted) -> bool:
    """Return whether the grain can be where the log says, and its entry has not become something else."""
    if note.extent >= len(link.extents):
        return False
    extent = link.extents[note.extent].extent
    if not isinstance(extent, GrainExtent) or not 0 <= note.grain * extent.grain_bytes < extent.capacity:
        return False
    if note.sector > GTE_ZEROED and sector_bytes(note.sector) >= extent.file.size():
        return False
    entry = extent.tables.entry(note.grain)
    return entry <= GTE_ZEROED or entry == note.sector
