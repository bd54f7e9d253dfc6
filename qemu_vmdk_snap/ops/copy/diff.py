"""What changed between two links of a chain: as runs, or as an image that contains only the changes.

    full backup of BASE, then  delta(BASE, TOP)  ->  apply(delta, copy of BASE)  =  TOP

The delta is an overlay on BASE like any other, with TOP's CID and BASE's as parentCID. Beside BASE it reads as TOP,
and `apply` merges it into a copy of BASE, which then is TOP, CID included, and takes the next delta.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from qemu_vmdk_snap.chain.chain import Chain, open_links
from qemu_vmdk_snap.chain.identity import hint_to, with_cid
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.errors import InvalidRequest
from qemu_vmdk_snap.light import dataclass
from qemu_vmdk_snap.ops.copy.transfer import STEP, LinkWriter, View, upper_tables
from qemu_vmdk_snap.ops.make.create import create_overlay
from qemu_vmdk_snap.ops.make.layout import ImageOptions
from qemu_vmdk_snap.ops.progress import Meter, OnProgress, ignore
from qemu_vmdk_snap.storage.durable import new_file, publish, temporary_name, working_in
from qemu_vmdk_snap.units import SECTOR_SIZE, round_up
from qemu_vmdk_snap.vmdk.descriptor import make_descriptor
from qemu_vmdk_snap.vmdk.runs import HOLE, ZERO
from qemu_vmdk_snap.vmdk.stream.writer import StreamWriter

OPERATION: Final = "diff"
_GRAIN: Final = 64 << 10
_INHERITED: Final = ("adapterType", "geometry.cylinders", "geometry.heads", "geometry.sectors", "virtualHWVersion")


class Change(NamedTuple):
    """A range that some link above the base stores; its content may equal that of the base. Bytes."""

    offset: int
    length: int
    zero: bool
    """Whether it reads as zeros without being stored."""

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types, as `image diff --output=json` lists it."""
        return {"start": self.offset, "length": self.length, "zero": self.zero, "data": not self.zero}


@dataclass(frozen=True, slots=True)
class DeltaReport:
    """What a delta contains; sizes in bytes."""

    path: Path
    cid: int
    """The CID of the top, which the delta has as well."""
    parent_cid: int
    """The CID of the base."""
    changed: int
    base: Path
    top: Path
    capacity: int

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types, as `image diff -d FILE --output=json` shows it."""
        return {
            "base": str(self.base),
            "top": str(self.top),
            "base-cid": self.parent_cid,
            "top-cid": self.cid,
            "virtual-size": self.capacity,
            "delta": str(self.path),
            "changed": self.changed,
        }


def depth_of(chain: Chain, base: Path | str) -> int:
    """Return how deep in the chain `base` is.

    Raises:
        InvalidRequest: it is not below the top.
    """
    real = Path(base).resolve()
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
    chain: Chain,
    depth: int,
    path: Path | str,
    *,
    stream: bool = True,
    durable: bool = True,
    on_progress: OnProgress = ignore,
) -> DeltaReport:
    """Make `path` an overlay on the link at `depth` that contains what the links above it store.

    It is streamOptimized, or with `stream` off monolithicSparse, which a guest can write to. It appears when it
    is complete. Beside the base, under the name in its hint, it reads as the top of `chain`.

    Raises:
        FileExistsError: the name exists; that file is not changed.
        OSError: the system refused; no file is left.
    """
    path = Path(path)
    base, top = chain.links[depth], chain.links[0]
    meter = Meter(OPERATION, chain.capacity, on_progress)
    make = _make_stream if stream else _make_sparse
    changed = make(chain, depth, path, durable, meter)
    return DeltaReport(path, top.cid, base.cid, changed, base.path, top.path, chain.capacity)


def _make_stream(chain: Chain, depth: int, path: Path, durable: bool, meter: Meter) -> int:
    """Store whole grains of the top's content wherever something changed; return how many bytes that is."""
    base, top = chain.links[depth], chain.links[0]
    ddb = {key: value for key in _INHERITED if (value := base.descriptor.get(f"ddb.{key}")) is not None}
    text = make_descriptor(
        cid=top.cid,
        parent_cid=base.cid,
        create_type="streamOptimized",
        hint=hint_to(path, base.path),
        extents=[("RDONLY", chain.capacity // SECTOR_SIZE, "SPARSE", path.name, None)],
        ddb=ddb,
        path=path,
    )
    with new_file(path, durable=durable) as file:
        position = 0

        def append(data: bytes) -> None:
            nonlocal position
            file.write_at(position, data)
            position += len(data)

        writer = StreamWriter(append, chain.capacity // SECTOR_SIZE, text, path, store_zeros=True)
        try:
            changed = _stream_grains(chain, depth, writer, meter)
            writer.finish()
        finally:
            writer.close()
    return changed


def _stream_grains(chain: Chain, depth: int, writer: StreamWriter, meter: Meter) -> int:
    changed, done = 0, 0
    below = View(chain, depth)
    for change in changes(chain, depth):
        start = max(done, change.offset - change.offset % _GRAIN)
        done = min(chain.capacity, round_up(change.offset + change.length, _GRAIN))
        while start < done:
            stop = min(done, start + STEP)
            data = chain.read_at(start, stop - start)
            for at in range(start, stop, _GRAIN):
                grain = data[at - start : at - start + _GRAIN]
                if any(grain) or not below.is_zero(at, len(grain)):
                    writer.write_run(at, grain)
                    changed += len(grain)
            start = stop
            meter.reach(stop)
    meter.reach(chain.capacity)
    return changed


def _make_sparse(chain: Chain, depth: int, path: Path, durable: bool, meter: Meter) -> int:
    """Store what changed in an overlay; return how many bytes that is."""
    base, top = chain.links[depth], chain.links[0]
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    temporary = temporary_name(path)
    options = ImageOptions(zeroed_grain=True)
    with working_in(path.parent):
        try:
            create_overlay(temporary, base.path, size=chain.capacity, options=options, durable=False, name=path.name)
            with open_links(temporary, writable_depths=[0], resolver=confined([base.path.resolve().parent])) as target:
                changed = 0
                writer = LinkWriter(target.links[0], View(target, 1), meter.step)
                for table in upper_tables(chain, depth, 0, chain.capacity):
                    rows = table.rows()
                    writer.put_rows(rows, chain)
                    changed += sum(row.length for row in rows if row.kind != HOLE)
                    meter.reach(table.end)
                writer.finish()
                target.links[0].write_descriptor(with_cid(target.links[0].descriptor, top.cid))
            publish(temporary, path, durable=durable)
        finally:
            temporary.unlink(missing_ok=True)
    return changed
