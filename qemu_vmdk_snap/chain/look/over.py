"""Reading the tables of an extent for no other reason than to see whether they can be followed."""

from __future__ import annotations

import itertools
from typing import Final

from qemu_vmdk_snap.chain.windows import extent_windows
from qemu_vmdk_snap.errors import FormatError
from qemu_vmdk_snap.vmdk.extent import Extent
from qemu_vmdk_snap.vmdk.flat.extent import FlatExtent

_WINDOWS: Final = 32
"""Of 2^18 grains each: half a TiB of grains of 64 KiB."""


def look_over(extent: Extent) -> list[str]:
    """Return what is wrong with an extent so that reading all of it would be refused, one line each.

    What can be read all the same goes to the extent's own notes. Only the beginning of a very large extent is looked
    at, so that the time is bounded: `check` reads everything.
    """
    # What there is to say of these is known since they were opened.
    if isinstance(extent, FlatExtent) or getattr(extent, "small_entries", lambda: None)() is not None:
        return []
    try:
        for start, stop in itertools.islice(extent_windows(extent), _WINDOWS):
            extent.resolve(start, stop)
    except FormatError as error:
        return [str(error)]
    return []
