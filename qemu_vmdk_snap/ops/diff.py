"""What changed between two links of a chain: as runs, or as an image of its own that holds the changes alone.

    full backup of BASE, then  delta(BASE, TOP)  ->  apply(delta, copy of BASE)  =  TOP

The delta is an overlay on BASE like any other, with TOP's CID and BASE's as parentCID. Beside BASE it reads as TOP,
and `apply` merges it into a copy of BASE, which then is TOP, CID included, and takes the next delta.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from qemu_vmdk_snap.chain.chain import Chain, open_links
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.errors import InvalidRequest
from qemu_vmdk_snap.ops.create import create_overlay
from qemu_vmdk_snap.ops.progress import Meter, OnProgress, ignore
from qemu_vmdk_snap.ops.relink import with_cid
from qemu_vmdk_snap.ops.transfer import LinkWriter, View, upper_tables
from qemu_vmdk_snap.storage.durable import publish, temporary_name
from qemu_vmdk_snap.vmdk.runs import HOLE, ZERO

OPERATION: Final = "diff"


class Change(NamedTuple):
    """A stretch that some link above the base stores; it may still hold what the base holds. Bytes."""

    offset: int
    length: int
    zero: bool
    """Whether it reads as zeros without being stored."""


@dataclass(frozen=True, slots=True)
class DeltaReport:
    """What a delta holds; sizes in bytes."""

    path: Path
    cid: int
    parent_cid: int
    changed: int


def depth_of(chain: Chain, base: Path) -> int:
    """Return how deep in the chain `base` is.

    Raises:
        InvalidRequest: it is not below the top.
    """
    real = base.resolve()
    for depth, link in enumerate(chain.links):
        if depth and link.path.resolve() == real:
            return depth
    raise InvalidRequest(chain.path, f"{base} is not below it in its backing chain")


def changes(chain: Chain, depth: int, on_progress: OnProgress = ignore) -> Iterator[Change]:
    """Yield what the links above the one at `depth` store, in order, neighbours joined."""
    meter = Meter(OPERATION, chain.capacity, on_progress)
    last: Change | None = None
    for table in upper_tables(chain, depth, 0, chain.capacity):
        for row in table.rows():
            if row.kind == HOLE:
                continue
            zero = row.kind == ZERO
            if last is not None and last.offset + last.length == row.offset and last.zero == zero:
                last = last._replace(length=last.length + row.length)
                continue
            if last is not None:
                yield last
            last = Change(row.offset, row.length, zero)
        meter.reach(table.end)
    if last is not None:
        yield last


def make_delta(
    chain: Chain, depth: int, path: Path | str, *, durable: bool = True, on_progress: OnProgress = ignore
) -> DeltaReport:
    """Make `path` an image that holds what the links above the one at `depth` store, and stands on that one.

    It appears when it is complete. Put beside the base under the name that it knows, it reads as the top of `chain`.

    Raises:
        FileExistsError: something bears the name; it is untouched.
        OSError: the system refused; nothing is left behind.
    """
    path, base, top = Path(path), chain.links[depth], chain.links[0]
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    temporary = temporary_name(path)
    try:
        create_overlay(temporary, base.path, size=chain.capacity, durable=False, name=path.name)
        resolver = confined([base.path.resolve().parent])
        with open_links(temporary, writable_depths=[0], resolver=resolver) as target:
            changed = _fill(chain, depth, target, on_progress)
            target.links[0].write_descriptor(with_cid(target.links[0].descriptor, top.cid))
        publish(temporary, path, durable=durable)
    finally:
        temporary.unlink(missing_ok=True)
    return DeltaReport(path, top.cid, base.cid, changed)


def _fill(chain: Chain, depth: int, target: Chain, on_progress: OnProgress) -> int:
    changed = 0
    meter = Meter(OPERATION, chain.capacity, on_progress)
    writer = LinkWriter(target.links[0], View(target, 1), meter.step)
    for table in upper_tables(chain, depth, 0, chain.capacity):
        rows = table.rows()
        writer.put_rows(rows, chain)
        changed += sum(row.length for row in rows if row.kind != HOLE)
        meter.reach(table.end)
    writer.finish()
    return changed
