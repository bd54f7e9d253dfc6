"""Which files belong to an image alone: those that may be deleted, made longer, or merged into with it.

A descriptor may name any file of its folder as an extent: `RW 8 FLAT "id_rsa" 0`, or another image. Reading what is in
such a file is safe; deleting it, or writing to it, is not.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from qemu_vmdk_snap.chain.link import Link
from qemu_vmdk_snap.chain.needs.claims import read_claims
from qemu_vmdk_snap.errors import InvalidRequest
from qemu_vmdk_snap.units import sector_bytes

_DEVICES: Final = ("VMFSRDM", "VMFSRAW")


def own_files(link: Link) -> list[Path]:
    """Return the files of the image, its descriptor's last, where each is known to be its own.

    Raises:
        InvalidRequest: one is a symbolic link or a device, an image of its own, or larger than the descriptor says.
    """
    extents: list[Path] = []
    for line, placed in zip(link.descriptor.extents, link.extents, strict=False):
        file = placed.extent.file
        if file is None or file.path == link.path:
            continue
        if file.path.is_symlink() or line.type in _DEVICES:
            raise InvalidRequest(link.path, f"its extent {file.path} is a symbolic link or a device: not its own")
        if not _named_after(file.path, link.path):
            _require_own(link, file.path)
        extents.append(file.path)
    return [*dict.fromkeys(extents), link.path]


def require_own_files(link: Link) -> None:
    """Require that each file that a write to the image may change is known to be its own, or a device.

    Symbolic links are followed.

    Raises:
        InvalidRequest: one is an image of its own, or larger than the descriptor says.
    """
    for line, placed in zip(link.descriptor.extents, link.extents, strict=False):
        file = placed.extent.file
        if file is None or file.path == link.path or line.access != "RW" or line.type in _DEVICES:
            continue
        if not _named_after(file.path, link.path) and file.path.is_file():
            _require_own(link, file.path)


def _named_after(extent: Path, image: Path) -> bool:
    """Return whether the extent's name is derived from the image's: NAME-flat, -s001, -f001, -delta, -sesparse."""
    stem = image.name[: -len(".vmdk")] if image.name.lower().endswith(".vmdk") else image.name
    rest = extent.name.removeprefix(stem)
    kinds = r"-(flat|delta|sesparse|[sf]\d{3,}|pt|rdmp?|raw)(-\d+)?\.vmdk"
    return rest != extent.name and re.fullmatch(kinds, rest, re.IGNORECASE) is not None


def _require_own(link: Link, path: Path) -> None:
    """Judge an extent by its content: a sparse one has no descriptor, a flat one exactly the size it is to have."""
    file = next(file for file in link.files if file.path == path)
    descriptor = file.fileno()
    if descriptor is None:
        return
    claims = read_claims(descriptor)
    if claims.names or claims.cid is not None or claims.problem is not None:
        raise InvalidRequest(link.path, f"its extent {path} is an image of its own")
    flat = [
        line
        for line, placed in zip(link.descriptor.extents, link.extents, strict=False)
        if placed.extent.file is file and line.type in ("FLAT", "VMFS")
    ]
    end = max((line.offset + line.sectors for line in flat), default=None)
    if end is not None and file.size() != sector_bytes(end):
        reason = f"has {file.size()} bytes, not the {sector_bytes(end)} that the descriptor says: it is not its own"
        raise InvalidRequest(link.path, f"its extent {path} {reason}")
