"""The interface of every kind of extent, and how the module that reads a kind is found.

An extent is a stretch of the guest's disk with its own storage. Offsets are bytes from the extent's start unless they
are called file offsets. To add a kind: write one module with `open_extent`, and name it in `vmdk.registry`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from qemu_vmdk_snap.errors import Unsupported
from qemu_vmdk_snap.light import TYPE_CHECKING, NamedTuple, Protocol, cast, dataclass
from qemu_vmdk_snap.storage.blockfile import BlockFile, Buffer
from qemu_vmdk_snap.vmdk.descriptor import ExtentLine
from qemu_vmdk_snap.vmdk.noted import Notes
from qemu_vmdk_snap.vmdk.registry import MODULES

if TYPE_CHECKING:
    from qemu_vmdk_snap.vmdk.runs import RunTable

Below = Callable[[int, int], bytes]
"""Reads (extent offset, length) as the guest sees it below this link: fills the rest of a partly written grain."""


class Place(NamedTuple):
    """Where one byte of the extent is, and for how many more bytes the same holds."""

    kind: int
    """A kind of `vmdk.runs`: HOLE, ZERO, DATA or COMPRESSED."""
    file_offset: int
    """Of the byte itself where the kind is DATA; of the grain's record where it is COMPRESSED; else 0."""
    length: int


@dataclass(frozen=True, slots=True)
class ExtentSpec:
    """The arguments for opening an extent."""

    line: ExtentLine
    path: Path
    file: BlockFile | None
    """None for an extent without a file (ZERO, NOACCESS)."""
    writable: bool


class Extent(Protocol):
    """An open extent. Reading never changes it; writes are durable after `flush`."""

    @property
    def capacity(self) -> int:
        """Bytes of the guest's disk that it stands for."""

    @property
    def grain_bytes(self) -> int:
        """The unit that is allocated at once; for a kind without grains the whole capacity."""

    @property
    def varied_bytes(self) -> int:
        """Up to where in the extent each grain may be a run of its own; from there to its end there is only one."""

    @property
    def file(self) -> BlockFile | None:
        """Where its stored runs are, or None for one without a file."""

    @property
    def notes(self) -> Notes:
        """Faults that do not prevent reading."""

    def lookup(self, offset: int) -> Place:
        """Return where the byte at `offset` is."""

    def resolve(self, start: int, end: int) -> RunTable:
        """Return the runs of [start, end), sources not yet set. Memory is a few dozen bytes a grain."""

    def read_grain(self, file_offset: int) -> bytes:
        """Return the inflated grain whose record is at `file_offset`; only for kinds that have COMPRESSED runs."""

    def write(self, offset: int, data: Buffer, below: Below) -> None:
        """Write `data` at `offset`; grains covered in part are filled up from `below` when they are new."""

    def flush(self) -> None:
        """Return when all writes are durable, data before the tables that name it."""


class PlacedExtent(NamedTuple):
    """An extent, the byte of the guest's disk where it begins, and its number among the sources of the chain."""

    start: int
    extent: Extent
    source: int


class ExtentModule(Protocol):
    """The interface of the module of a kind."""

    def open_extent(self, spec: ExtentSpec) -> Extent:
        """Open an extent of this kind; raises FormatError or Unsupported."""


def open_extent(spec: ExtentSpec) -> Extent:
    """Open the extent that `spec.line` describes.

    Raises:
        FormatError: what is on disk breaks the format.
        Unsupported: the kind, or the requested access, is not supported.
    """
    module = MODULES["ZERO"] if spec.line.access == "NOACCESS" else MODULES.get(spec.line.type)
    if module is None:
        raise Unsupported(spec.path, f"byte {spec.line.at:#x}: extents of type {spec.line.type} are not supported")
    return cast(ExtentModule, importlib.import_module(module)).open_extent(spec)
