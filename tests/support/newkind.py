"""A kind of extent that nobody has: the guest's bytes behind one sector of header. All that it takes to add one."""

from __future__ import annotations

from dataclasses import dataclass, field

from qemu_vmdk_snap.errors import FormatError
from qemu_vmdk_snap.storage.blockfile import BlockFile, Buffer
from qemu_vmdk_snap.units import SECTOR_SIZE, sector_bytes
from qemu_vmdk_snap.vmdk.extent import Below, Extent, ExtentSpec, Place
from qemu_vmdk_snap.vmdk.noted import Notes
from qemu_vmdk_snap.vmdk.runs import DATA, RunTable


def open_extent(spec: ExtentSpec) -> Extent:
    assert spec.file is not None
    if spec.file.read_at(0, 4) != b"NEW!":
        raise FormatError(spec.path, 0, "magic", spec.file.read_at(0, 4), "must be b'NEW!'")
    return NewExtent(spec.file, sector_bytes(spec.line.sectors))


@dataclass
class NewExtent:
    file: BlockFile
    capacity: int
    notes: Notes = field(default_factory=Notes)

    @property
    def grain_bytes(self) -> int:
        return self.capacity

    @property
    def varied_bytes(self) -> int:
        return self.capacity

    def lookup(self, offset: int) -> Place:
        return Place(DATA, SECTOR_SIZE + offset, self.capacity - offset)

    def resolve(self, start: int, end: int) -> RunTable:
        return RunTable.single(start, end, DATA, file_offset=SECTOR_SIZE + start)

    def read_grain(self, file_offset: int) -> bytes:
        raise NotImplementedError

    def write(self, offset: int, data: Buffer, below: Below) -> None:
        self.file.write_at(SECTOR_SIZE + offset, data)

    def flush(self) -> None:
        self.file.flush()
