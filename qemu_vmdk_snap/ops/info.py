"""What an image is: its size, kind, CIDs, parent and extents, without opening its parents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qemu_vmdk_snap.chain.link import Link, open_link, read_descriptor
from qemu_vmdk_snap.chain.look.over import look_over
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.errors import CidMismatch, CorruptChain, VmdkSnapError
from qemu_vmdk_snap.light import NamedTuple, dataclass
from qemu_vmdk_snap.storage.blockfile import PosixFile, open_posix, open_posix_or_device
from qemu_vmdk_snap.vmdk.grain.extent import GrainExtent
from qemu_vmdk_snap.vmdk.noted import Notes


@dataclass(frozen=True, slots=True)
class ExtentInfo:
    """One extent; sizes in bytes."""

    virtual_size: int
    path: Path | None
    """None for an extent without a file."""
    type: str
    grain_bytes: int
    """The unit of allocation; 0 where there is none."""
    compressed: bool

    def as_dict(self) -> dict[str, object]:
        """Return the extent under the keys of `qemu-img info`."""
        return {
            **({"compressed": True} if self.compressed else {}),
            "virtual-size": self.virtual_size,
            "filename": None if self.path is None else str(self.path),
            **({"cluster-size": self.grain_bytes} if self.grain_bytes else {}),
            "format": self.type,
        }


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """One image; sizes in bytes."""

    path: Path
    virtual_size: int
    actual_size: int
    """What its files take on disk."""
    grain_bytes: int
    """The smallest grain of its extents; 0 where none has grains."""
    create_type: str
    cid: int
    parent_cid: int
    hint: str | None
    parent: Path | None
    """Where the hint leads, or None: there is no parent, it does not exist, or it may not be opened."""
    extents: tuple[ExtentInfo, ...]
    notes: tuple[str, ...]
    """What was found wrong, of each kind one line: with the image itself, or between it and its parent."""

    def as_dict(self) -> dict[str, object]:
        """Return the image under the keys of `qemu-img info`; the notes are the list `warnings`, if there are any."""
        answer: dict[str, object] = {
            "virtual-size": self.virtual_size,
            "filename": str(self.path),
            **({"cluster-size": self.grain_bytes} if self.grain_bytes else {}),
            "format": "vmdk",
            "actual-size": self.actual_size,
            "format-specific": {
                "type": "vmdk",
                "data": {
                    "cid": self.cid,
                    "parent-cid": self.parent_cid,
                    "create-type": self.create_type,
                    "extents": [extent.as_dict() for extent in self.extents],
                },
            },
            "dirty-flag": False,
        }
        if self.notes:
            answer["warnings"] = list(self.notes)
        if self.hint is not None:
            answer["backing-filename"] = self.hint
            answer["backing-filename-format"] = "vmdk"
            answer["full-backing-filename"] = None if self.parent is None else str(self.parent)
        return answer


class RawInfo(NamedTuple):
    """One raw image; sizes in bytes."""

    path: Path
    virtual_size: int
    actual_size: int
    """What it takes on disk."""

    def as_dict(self) -> dict[str, object]:
        """Return the image under the keys of `qemu-img info`."""
        return {
            "virtual-size": self.virtual_size,
            "filename": str(self.path),
            "format": "raw",
            "actual-size": self.actual_size,
            "dirty-flag": False,
        }


def image_info(
    path: Path | str, *, trusted_dirs: Sequence[Path | str] = (), lock: bool = True, allow_devices: bool = False
) -> ImageInfo:
    """Return what the image at `path` is; its parents need not exist.

    Its tables are read, so that a file that was cut short is seen, and the CID of its parent where there is one.

    Raises:
        FormatError, Unsupported, LockBusy, CorruptChain (an extent is missing), OSError: as `open_chain`.
    """
    opener = open_posix_or_device if allow_devices else open_posix
    resolver = confined([*trusted_dirs, "/dev"] if allow_devices else trusted_dirs)
    link = open_link(Path(path), opener=opener, writable=False, resolver=resolver, lock=lock)
    try:
        parent = _parent(link, trusted_dirs)
        return _describe(link, parent, None if parent is None else _cid_of(parent))
    finally:
        link.close()


def chain_info(
    path: Path | str, *, trusted_dirs: Sequence[Path | str] = (), lock: bool = True, allow_devices: bool = False
) -> list[ImageInfo]:
    """Return the images of the whole chain, the top first; CIDs are not compared: see `check_image`.

    Raises:
        CorruptChain: a parent is missing, may not be opened, or the chain is a loop; and all that `image_info` raises.
    """
    from qemu_vmdk_snap.chain.chain import open_chain

    with open_chain(path, trusted_dirs=trusted_dirs, lock=lock, check_cids=False, allow_devices=allow_devices) as chain:
        cids = [*(link.cid for link in chain.links[1:]), None]
        return [_describe(link, _parent(link, trusted_dirs), cid) for link, cid in zip(chain.links, cids, strict=True)]


def raw_info(path: Path | str, *, lock: bool = True, allow_devices: bool = False) -> RawInfo:
    """Return what the raw image at `path` is, which may be a block device where these are allowed.

    Raises:
        LockBusy: another process writes it.
        OSError: it cannot be opened.
    """
    from qemu_vmdk_snap.chain.disk import RawDisk

    with RawDisk(path, lock=lock, allow_devices=allow_devices) as disk:
        return RawInfo(disk.path, disk.capacity, disk.path.stat().st_blocks * 512)


def _describe(link: Link, parent: Path | None, parent_cid: int | None) -> ImageInfo:
    refused = Notes()
    for placed in link.extents:
        for note in look_over(placed.extent):
            refused.add("refused", note)
    notes = [*link.notes, *refused]
    if parent is not None and parent_cid is not None and parent_cid != link.parent_cid:
        notes.append(str(CidMismatch(link.path, parent, link.parent_cid, parent_cid)))
    extents = tuple(
        ExtentInfo(
            placed.extent.capacity,
            placed.extent.file.path if placed.extent.file else None,
            line.type,
            placed.extent.grain_bytes if isinstance(placed.extent, GrainExtent) else 0,
            isinstance(placed.extent, GrainExtent) and placed.extent.compressed,
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
        parent=parent,
        extents=extents,
        notes=tuple(notes),
    )


def _parent(link: Link, trusted_dirs: Sequence[Path | str]) -> Path | None:
    if link.hint is None:
        return None
    try:
        return confined(trusted_dirs)(link.path, link.hint, "parent")
    except CorruptChain:
        return None


def _cid_of(path: Path) -> int | None:
    """Return the CID of the image, or None where it cannot be read."""
    try:
        file = PosixFile.open(path)
        try:
            return read_descriptor(file)[0].cid
        finally:
            file.close()
    except (VmdkSnapError, OSError):
        return None
