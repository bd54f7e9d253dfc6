"""One file to another place as it is: its bytes, its holes, its owner, its mode and its attributes."""

from __future__ import annotations

import os
from pathlib import Path

from qemu_vmdk_snap.ops.progress import Meter, OnProgress, ignore
from qemu_vmdk_snap.storage.attributes import copy_attributes
from qemu_vmdk_snap.storage.blockfile import PosixFile
from qemu_vmdk_snap.storage.copying import Copier
from qemu_vmdk_snap.storage.durable import new_file

_STEP = 64 << 20


def copy_file(
    source: Path | str, path: Path | str, *, durable: bool = True, on_progress: OnProgress = ignore
) -> tuple[int, int]:
    """Make `path` a copy of the file `source`, whatever is in it; return the device and inode of the copy.

    Holes stay holes, and where the file system can, the copy shares the data. It has the owner, the mode and the
    extended attributes of the source. It appears when it is complete and durable; nothing is overwritten. Whoever calls
    keeps writers from the source.

    Raises:
        FileExistsError: the name exists; that file is not changed.
        OSError: the source is no regular file, or cannot be read, or the copy not be made; nothing is left of it.
    """
    source, path = Path(source), Path(path)
    original = PosixFile.open(source)
    try:
        facts = os.fstat(original.fileno())
        with new_file(path, durable=durable, mode=0o600) as copy:
            _copy_data(original, copy, facts.st_size, Meter("copy", facts.st_size, on_progress))
            copy_attributes(original.fileno(), copy.fileno())
            made = os.fstat(copy.fileno())
    finally:
        original.close()
    return made.st_dev, made.st_ino


def _copy_data(original: PosixFile, copy: PosixFile, size: int, meter: Meter) -> None:
    copier = Copier(copy)
    copy.truncate(size)
    offset = 0
    while offset < size:
        data = min(size, original.next_data(offset))
        meter.step(data - offset)
        end = min(size, original.next_hole(data)) if data < size else size
        while data < end:
            length = min(_STEP, end - data)
            copier.copy(original, data, data, length, meter.step)
            data += length
        offset = end
