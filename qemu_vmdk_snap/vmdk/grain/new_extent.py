"""Making a new extent: what every kind that can be made offers.

To let a kind be made: write one module with `plan_extent`, and name it in a line of `ops.make.layout.KINDS`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from qemu_vmdk_snap.light import dataclass
from qemu_vmdk_snap.storage.blockfile import BlockFile

if TYPE_CHECKING:
    from qemu_vmdk_snap.vmdk.grain.bulk import BulkWriter


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a new extent is planned from; a kind takes of it what means something to it."""

    path: Path
    """For messages."""
    sectors: int
    grain_sectors: int
    zeroed_grains: bool
    geometry: tuple[int, int, int]
    """Cylinders, heads, sectors."""
    descriptor: bytes | None
    """To be embedded; None where it is a file of its own."""
    reserve: bool
    """Whether its space is to be there from the start."""


class ExtentLayout(Protocol):
    """A planned extent."""

    @property
    def grain_bytes(self) -> int:
        """The unit in which the file grows; 0 for a kind without grains."""

    @property
    def fixed_bytes(self) -> int:
        """What the file holds before any grain is stored."""

    def create(self, file: BlockFile) -> None:
        """Write all but the grains into the empty `file`."""

    def writer(self, file: BlockFile) -> BulkWriter:
        """Return what fills the file that `create` has prepared."""


class LayoutModule(Protocol):
    """What the module of a kind that can be made has."""

    def plan_extent(self, wanted: Wanted) -> ExtentLayout:
        """Return the layout; raises Unsupported where the kind cannot hold so much."""


def plan_extent(module: str, wanted: Wanted) -> ExtentLayout:
    """Return the layout of a new extent by the module that is called `module`; raises Unsupported as that does."""
    return cast(LayoutModule, importlib.import_module(module)).plan_extent(wanted)
