"""The extent without storage: ZERO, and any extent with access NOACCESS. It reads as zeros, over any parent.

QEMU 7.2 skips such lines, which moves what follows them; VirtualBox counts them, reads ZERO as zeros and fails to read
NOACCESS. Here both read as zeros, and the rest of the disk stays in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qemu_vmdk_snap.errors import Unsupported
from qemu_vmdk_snap.storage.blockfile import Buffer
from qemu_vmdk_snap.units import KIB, sector_bytes
from qemu_vmdk_snap.vmdk.extent import Below, ExtentSpec, Place
from qemu_vmdk_snap.vmdk.noted import Notes
from qemu_vmdk_snap.vmdk.runs import ZERO, RunTable

_UNIT = 64 * KIB


def open_extent(spec: ExtentSpec) -> ZeroExtent:
    """Open an extent without storage."""
    return ZeroExtent(spec.path, sector_bytes(spec.line.sectors), spec.line.access)


class ZeroExtent:
    """One extent that has no file."""

    def __init__(self, path: Path, capacity: int, access: str) -> None:
        self._path = path
        self._capacity = capacity
        self._access = access
        self.notes = Notes()
        if access == "NOACCESS":
            self.notes.add("no access", f"{path}: an extent of {capacity} bytes is marked NOACCESS: it reads as zeros")

    @property
    def capacity(self) -> int:
        """Bytes of the guest's disk that it stands for."""
        return self._capacity

    @property
    def grain_bytes(self) -> int:
        """A nominal unit: nothing is allocated."""
        return _UNIT

    @property
    def varied_bytes(self) -> int:
        """0: the whole extent is one run."""
        return 0

    @property
    def file(self) -> None:
        """None: there is no file."""
        return

    def lookup(self, offset: int) -> Place:
        """Return zeros to the end of the extent."""
        return Place(ZERO, 0, self._capacity - offset)

    def resolve(self, start: int, end: int) -> RunTable:
        """Return one run of zeros."""
        return RunTable.single(start, end, ZERO)

    def small_entries(self) -> int:
        """Return 0: it has no tables."""
        return 0

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield one piece of zeros."""
        yield start, end - start, ZERO, 0

    def read_grain(self, file_offset: int) -> bytes:
        """Never called: nothing is stored."""
        raise NotImplementedError(f"{self._path}: no compressed grain at {file_offset:#x}")

    def write(self, offset: int, data: Buffer, below: Below) -> None:
        """Refuse any data but zeros."""
        if self._access != "RW" or bytes(data).count(0) != len(data):
            raise Unsupported(self._path, f"an extent without storage cannot take data at its byte {offset}")

    def flush(self) -> None:
        """Do nothing: nothing is stored."""
