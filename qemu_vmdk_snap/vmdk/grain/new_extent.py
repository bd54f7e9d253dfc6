"""Making a new extent: the interface of every kind that can be created.

To let a kind be created: write one module with `plan_extent`, and name it in a line of `ops.make.layout.KINDS`.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from qemu_vmdk_snap.light import TYPE_CHECKING, Protocol, cast, dataclass
from qemu_vmdk_snap.storage.blockfile import BlockFile

if TYPE_CHECKING:
    from qemu_vmdk_snap.vmdk.grain.bulk import BulkWriter


@dataclass(frozen=True, slots=True)
class Wanted:
    """The arguments for planning a new extent; a kind uses those that apply to it."""

    path: Path
    """For messages."""
    sectors: int
    grain_sectors: int
    zeroed_grains: bool
    geometry: tuple[int, int, int]
    """Cylinders, heads, sectors."""
    descriptor: bytes | None
    """The descriptor to embed; None if it is a file of its own."""
    reserve: bool
    """Whether its space is reserved from the start."""


class ExtentLayout(Protocol):
    """A planned extent."""

    @property
    def grain_bytes(self) -> int:
        """The unit in which the file grows; 0 for a kind without grains."""

    @property
    def fixed_bytes(self) -> int:
        """The length of the file before any grain is stored."""

    def create(self, file: BlockFile) -> None:
        """Write all but the grains into the empty `file`."""

    def writer(self, file: BlockFile) -> BulkWriter:
        """Return what fills the file that `create` has prepared."""


class LayoutModule(Protocol):
    """The interface of the module of a kind that can be created."""

    def plan_extent(self, wanted: Wanted) -> ExtentLayout:
        """Return the layout; raises Unsupported if the size exceeds what the kind can store."""


def plan_extent(module: str, wanted: Wanted) -> ExtentLayout:
    """Return the layout of a new extent by the module that is called `module`; raises Unsupported as that does."""
    return cast(LayoutModule, importlib.import_module(module)).plan_extent(wanted)
