"""Faults that the size of an extent's file shows: without NumPy, for callers that only read the heads of files.

A file that is too short was cut: by an interrupted copy or download, or a full file system. A hosted sparse extent is
always whole sectors; one that is not was cut, or edited: `sed -i` on an embedded descriptor moves everything that
follows by the bytes that the text grew.
"""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.units import SECTOR_SIZE, sector_bytes
from qemu_vmdk_snap.vmdk.noted import Notes


def of_flat(path: Path, size: int, start: int, capacity: int) -> Notes:
    """Return the notes on a flat extent of `capacity` bytes at byte `start` of a file of `size` bytes."""
    notes = Notes()
    missing = start + capacity - size
    if missing > 0:
        notes.add("flat", f"{path}: is {missing} bytes shorter than its extent: what is missing reads as zeros")
    return notes


def of_sparse(path: Path, size: int, overhead: int, field_at: int) -> Notes:
    """Return the notes on a plain hosted sparse extent in a file of `size` bytes.

    `overhead` is its header's field of that name, in sectors; `field_at` the byte of the file where it is.
    """
    notes = Notes()
    if sector_bytes(overhead) > size:
        where = f"byte {field_at:#x}: overhead = {overhead}"
        notes.add("tables", f"{path}: {where}: the file of {size} bytes ends inside its tables: it was cut short")
    if size % SECTOR_SIZE:
        notes.add(
            "length",
            f"{path}: its length of {size} bytes is not a whole number of sectors: it was cut short, or its embedded "
            "descriptor was edited by a program that moved everything after it",
        )
    return notes


def of_grain(path: Path, size: int, position: int, grain: int, missing: int) -> str:
    """Return the note on a grain stored at byte `position`, whose end is past the end of a file of `size` bytes."""
    where = f"byte {position:#x}: grain {grain}"
    return f"{path}: {where}: {missing} bytes of it are past the end of the file of {size} bytes and read as zeros"
