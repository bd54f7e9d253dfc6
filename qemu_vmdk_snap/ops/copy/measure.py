"""How much space a new image would take, before it is made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qemu_vmdk_snap.chain.chain import Chain
from qemu_vmdk_snap.chain.disk import Disk
from qemu_vmdk_snap.chain.small import is_small
from qemu_vmdk_snap.errors import Unsupported
from qemu_vmdk_snap.light import Final, dataclass
from qemu_vmdk_snap.light import numpy as np
from qemu_vmdk_snap.ops.make.create import plan_base
from qemu_vmdk_snap.ops.make.layout import ImageOptions
from qemu_vmdk_snap.ops.progress import Meter, OnProgress, ignore
from qemu_vmdk_snap.units import SECTOR_SIZE, round_up, sector_bytes
from qemu_vmdk_snap.vmdk.runs import DATA, Int64s

OPERATION: Final = "measure"


@dataclass(frozen=True, slots=True)
class Measurement:
    """Sizes in bytes, as files have them; a sparse file may take less on the disk."""

    required: int
    """For the current data."""
    fully_allocated: int
    """For a disk whose every byte was written."""

    def as_dict(self) -> dict[str, object]:
        """Return the sizes under the keys of `qemu-img measure`."""
        return {"required": self.required, "fully-allocated": self.fully_allocated}


def measure(
    disk: Disk | None,
    size: int,
    *,
    output_format: str = "vmdk",
    options: ImageOptions | None = None,
    on_progress: OnProgress = ignore,
) -> Measurement:
    """Return what an image of `disk`, or with None of an empty disk of `size` bytes, would take: the lengths of files.

    Grains that are stored are counted whole: a copy that looks for zeros in them may turn out smaller. A raw image is
    as long as its disk. The image is assumed to have the name of `disk`.

    Raises:
        Unsupported: the image would be streamOptimized.
        InvalidRequest: there is no such kind, or the size or an option is invalid.
    """
    capacity = round_up(size if disk is None else disk.capacity, SECTOR_SIZE)
    if output_format == "raw":
        return Measurement(capacity, capacity)
    # A descriptor in a file of its own names the extents: one of another name is as many bytes longer, or shorter.
    path = Path("disk.vmdk") if disk is None else disk.path.with_suffix(".vmdk")
    plan = plan_base(path, capacity, options or ImageOptions())
    if plan.kind.stream:
        raise Unsupported(path, "the size of a streamOptimized image depends on how its data deflates")
    overhead, full, unit = len(plan.descriptor) if plan.kind.suffix else 0, 0, 1
    for _, sectors, layout in plan.extents:
        overhead += layout.fixed_bytes
        if layout.grain_bytes:
            unit = layout.grain_bytes
            full += round_up(sector_bytes(sectors), unit)
    if not full:
        return Measurement(overhead, overhead)
    return Measurement(overhead + _stored(disk, unit, capacity, on_progress), overhead + full)


def _stored(disk: Disk | None, unit: int, capacity: int, on_progress: OnProgress) -> int:
    """Return the bytes of all units that contain stored data, in whole units."""
    meter = Meter(OPERATION, capacity, on_progress)
    if disk is None:
        meter.reach(capacity)
        return 0
    total, last = 0, -1
    if isinstance(disk, Chain) and not is_small(disk.links):
        for starts, ends in _stretches(disk):
            if not len(starts):
                continue
            first, final = starts // unit, (ends - 1) // unit
            before = np.concatenate([[last], final[:-1]])
            total += int((final - np.maximum(first, before + 1) + 1).sum())
            last = int(final[-1])
            meter.reach(int(ends[-1]))
    else:
        for row in disk.rows():
            if row.kind >= DATA:
                end = row.offset + row.length
                total += (end - 1) // unit - max(row.offset // unit, last + 1) + 1
                last = (end - 1) // unit
                meter.reach(end)
    meter.reach(capacity)
    return total * unit


def _stretches(chain: Chain) -> Iterator[tuple[Int64s, Int64s]]:
    """Yield starts and ends of stored runs, in ascending order, many at a time."""
    for table in chain.tables():
        stored = table.kinds >= DATA
        yield table.starts[stored], (table.starts + table.lengths)[stored]
