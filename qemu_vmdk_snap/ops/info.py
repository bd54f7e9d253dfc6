"""What an image is: its size, kind, CIDs, parent and extents, without opening its parents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qemu_vmdk_snap.chain.chain import open_chain
from qemu_vmdk_snap.chain.link import Link, open_link
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.errors import CorruptChain
from qemu_vmdk_snap.storage.blockfile import open_posix, open_posix_or_device
from qemu_vmdk_snap.vmdk.grains import GrainExtent
from qemu_vmdk_snap.vmdk.stream.extent import StreamExtent


@dataclass(frozen=True, slots=True)
class ExtentInfo:
    """One extent; sizes in bytes."""

    virtual_size: int
    path: Path | None
    """None for an extent without a file."""
    type: str
    grain_bytes: int
    """What is allocated at once; 0 where nothing is."""
    compressed: bool


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """One image; sizes in bytes."""

    path: Path
    virtual_size: int
    actual_size: int
    """What its files take on disk."""
    grain_bytes: int
    """The smallest of its extents'; 0 where none allocates."""
    create_type: str
    cid: int
    parent_cid: int
    hint: str | None
    parent: Path | None
    """Where the hint leads, or None: there is no parent, it does not exist, or it may not be opened."""
    extents: tuple[ExtentInfo, ...]
    notes: tuple[str, ...]
    """What was found wrong, and could be read all the same."""


def image_info(
    path: Path | str, *, trusted_dirs: Sequence[Path | str] = (), lock: bool = True, allow_devices: bool = False
) -> ImageInfo:
    """Return what the image at `path` is; its parents are not opened, and need not exist.

    Raises:
        FormatError, Unsupported, LockBusy, CorruptChain (an extent is missing), OSError: as `open_chain`.
    """
    opener = open_posix_or_device if allow_devices else open_posix
    resolver = confined([*trusted_dirs, "/dev"] if allow_devices else trusted_dirs)
    link = open_link(Path(path), opener=opener, writable=False, resolver=resolver, lock=lock)
    try:
        return _describe(link, trusted_dirs)
    finally:
        link.close()


def chain_info(
    path: Path | str, *, trusted_dirs: Sequence[Path | str] = (), lock: bool = True, allow_devices: bool = False
) -> list[ImageInfo]:
    """Return the images of the whole chain, the top first; a CID that does not fit is for `check` to tell.

    Raises:
        CorruptChain: a parent is missing, may not be opened, or the chain is a loop; and all that `image_info` raises.
    """
    with open_chain(path, trusted_dirs=trusted_dirs, lock=lock, check_cids=False, allow_devices=allow_devices) as chain:
        return [_describe(link, trusted_dirs) for link in chain.links]


def _describe(link: Link, trusted_dirs: Sequence[Path | str]) -> ImageInfo:
    extents = tuple(
        ExtentInfo(
            placed.extent.capacity,
            placed.extent.file.path if placed.extent.file else None,
            line.type,
            placed.extent.grain_bytes if isinstance(placed.extent, GrainExtent) else 0,
            isinstance(placed.extent, StreamExtent),
        )
        for placed, line in zip(link.extents, link.descriptor.extents, strict=False)
    )
    units = [extent.grain_bytes for extent in extents if extent.grain_bytes]
    return ImageInfo(
        path=link.path,
        virtual_size=link.capacity,
        actual_size=sum(file.path.stat().st_blocks * 512 for file in link.files),
        grain_bytes=min(units, default=0),
        create_type=link.descriptor.create_type,
        cid=link.cid,
        parent_cid=link.parent_cid,
        hint=link.hint,
        parent=_parent(link, trusted_dirs),
        extents=extents,
        notes=tuple(link.notes),
    )


def _parent(link: Link, trusted_dirs: Sequence[Path | str]) -> Path | None:
    if link.hint is None:
        return None
    try:
        return confined(trusted_dirs)(link.path, link.hint, "parent")
    except CorruptChain:
        return None
