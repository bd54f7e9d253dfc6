"""A file that was given by mistake: the descriptor to open in its place, or what the file is instead of a VMDK."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from qemu_vmdk_snap.errors import FormatError
from qemu_vmdk_snap.light import Final
from qemu_vmdk_snap.storage.blockfile import PosixFile
from qemu_vmdk_snap.units import SECTOR_SIZE
from qemu_vmdk_snap.vmdk import foreign
from qemu_vmdk_snap.vmdk.descriptor import HEAD_BYTES, Descriptor, is_descriptor, spellings

_PART: Final = r"(?i)-(?:flat|delta|sesparse|rdmp?|ctk|[sf]\d{3})\Z"
_MAX_ENTRIES: Final = 20_000
_MAX_DESCRIPTOR: Final = 1 << 20


def instead_of(path: Path) -> str | None:
    """Return what `path` is and what to open instead, to be added to the error message; None: unknown."""
    with contextlib.suppress(OSError):
        file = PosixFile.open(path)
        try:
            size = file.size()
            head = file.read_at(0, foreign.HEAD_BYTES)
            tail = file.read_at(max(0, size - SECTOR_SIZE), SECTOR_SIZE)
        finally:
            file.close()
        owner = descriptor_naming(path)
        kind = foreign.kind_of(head, path.name, tail)
        if owner is not None:
            tracked = kind is not None and "change-tracking" in kind
            part = "the change-tracking file" if tracked else "an extent"
            return f"it is {part} of {owner}: open that descriptor instead"
        return None if kind is None else f"it is {kind}"
    return None


def descriptor_naming(path: Path) -> Path | None:
    """Return the descriptor in the folder of `path` that names it as an extent or as its change-tracking file."""
    for candidate in _candidates(path):
        with contextlib.suppress(OSError, FormatError):
            if _names(candidate, path):
                return candidate
    return None


def _candidates(path: Path) -> Iterator[Path]:
    """Yield the files that may be the descriptor, the one that VMware's naming rules suggest first."""
    import re  # for files given by mistake only

    likely = path.with_name(re.sub(_PART, "", path.stem) + path.suffix)
    if likely != path:
        yield likely
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in itertools.islice(entries, _MAX_ENTRIES):
            if entry.name.lower().endswith(".vmdk") and entry.name not in (path.name, likely.name):
                yield path.with_name(entry.name)


def _names(candidate: Path, path: Path) -> bool:
    if candidate.stat().st_size > _MAX_DESCRIPTOR:
        return False
    file = PosixFile.open(candidate)
    try:
        if not is_descriptor(file.read_at(0, HEAD_BYTES)):
            return False
        descriptor = Descriptor.parse(file.read_at(0, _MAX_DESCRIPTOR), path=candidate)
    finally:
        file.close()
    named = [line.file for line in descriptor.extents if line.file]
    named += [track] if (track := descriptor.get("changeTrackPath")) else []
    return any(_is(candidate.parent, spelling, path) for name in named for spelling in spellings(name))


def _is(folder: Path, name: str, path: Path) -> bool:
    if "\0" in name:
        return False
    for beside in {folder / name, folder / name.replace("\\", "/").rsplit("/", 1)[-1]}:
        with contextlib.suppress(OSError):
            if beside.samefile(path):
                return True
    return False
