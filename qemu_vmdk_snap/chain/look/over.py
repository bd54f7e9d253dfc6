"""Reading the tables of an extent only to see whether they are valid."""

from __future__ import annotations

import itertools

from qemu_vmdk_snap.chain.windows import extent_windows
from qemu_vmdk_snap.errors import FormatError
from qemu_vmdk_snap.light import Final
from qemu_vmdk_snap.vmdk.extent import Extent
from qemu_vmdk_snap.vmdk.flat.extent import FlatExtent

_WINDOWS: Final = 32
"""Of 2^18 grains each: half a TiB of grains of 64 KiB."""


def look_over(extent: Extent) -> list[str]:
    """Return the faults of an extent that prevent reading all of it, one line each.

    Other faults go to the extent's own notes. Only the beginning of a very large extent is looked at, so that the time
    is bounded: `check` reads everything.
    """
    # The notes of these are complete since they were opened.
    if isinstance(extent, FlatExtent) or getattr(extent, "small_entries", lambda: None)() is not None:
        return []
    try:
        for start, stop in itertools.islice(extent_windows(extent), _WINDOWS):
            extent.resolve(start, stop)
    except FormatError as error:
        return [str(error)]
    return []
