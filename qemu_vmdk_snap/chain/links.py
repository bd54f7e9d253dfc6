"""Descriptors and headers of a chain, without the tables, without NumPy, without a lock.

For callers that must decide fast whether a chain is valid (a hook at a guest's start), and for those that look at
many images. `check_image` reads the tables.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qemu_vmdk_snap.chain.link import read_descriptor
from qemu_vmdk_snap.chain.parent import Descent, find_parent
from qemu_vmdk_snap.chain.resolver import Resolver, check_opened, confined
from qemu_vmdk_snap.errors import CidMismatch, CorruptChain, FormatError, Unsupported
from qemu_vmdk_snap.storage.blockfile import PosixFile
from qemu_vmdk_snap.units import ByteOffset, sector_bytes
from qemu_vmdk_snap.vmdk.descriptor import NO_PARENT, Descriptor


class LinkFacts(NamedTuple):
    """What the descriptor of one link says."""

    path: Path
    cid: int
    parent_cid: int
    hint: str | None
    capacity: ByteOffset
    create_type: str
    files: tuple[Path, ...]
    """Every file of the link: that of the descriptor first."""
    descriptor: Descriptor

    @property
    def is_base(self) -> bool:
        """Whether neither its parentCID nor its hint names a parent."""
        return self.parent_cid == NO_PARENT and self.hint is None


def read_facts(
    path: Path | str,
    *,
    trusted_dirs: Sequence[Path | str] = (),
    resolver: Resolver | None = None,
    owner: Path | str | None = None,
) -> LinkFacts:
    """Return what the descriptor of one image says; its extents must be there.

    `owner` is the image whose hint led to it.

    Raises:
        FormatError: it is not a VMDK image, or its descriptor or header is invalid.
        Unsupported: it is an extent of a disk whose descriptor is another file, or has an unknown incompatible feature.
        CorruptChain: an extent is missing, or lies where it may not be opened.
        OSError: it cannot be read.
    """
    path, find = Path(path), resolver or confined(trusted_dirs)
    file = PosixFile.open(path)
    try:
        if owner is not None:
            check_opened(find, Path(owner), file, "parent")
        descriptor, embedded = read_descriptor(file)
    finally:
        file.close()
    names = [] if embedded else [line.file for line in descriptor.extents if line.file and line.access != "NOACCESS"]
    return LinkFacts(
        path=path,
        cid=descriptor.cid,
        parent_cid=descriptor.parent_cid,
        hint=descriptor.parent_hint,
        capacity=sector_bytes(descriptor.sectors),
        create_type=descriptor.create_type,
        files=(path, *(find(path, name, "extent") for name in names)),
        descriptor=descriptor,
    )


def read_links(path: Path | str, *, trusted_dirs: Sequence[Path | str] = ()) -> tuple[LinkFacts, ...]:
    """Return the links of the chain, the top first, after checking that each fits the one above.

    Raises:
        CorruptChain: a parent or extent is missing, is not allowed, or in a loop; or an operation on a link has begun
            and not ended.
        CidMismatch: a parent was written after its overlay was made.
        FormatError, Unsupported, OSError: see `read_facts`.
    """
    find, descent = confined(trusted_dirs), Descent()
    descent.step(Path(path))
    links = [read_facts(path, resolver=find)]
    while (place := find_parent(links[-1].descriptor, find)) is not None:
        child = links[-1]
        descent.step(place)
        parent = read_facts(place, resolver=find, owner=child.path)
        if parent.cid != child.parent_cid:
            raise CidMismatch(child.path, parent.path, child.parent_cid, parent.cid)
        links.append(parent)
    for link in links:
        _refuse_pending(link.path)
    return tuple(links)


def is_backed_by(path: Path, image: Path, resolver: Resolver) -> bool:
    """Return whether `image` is `path` itself, or in its backing chain, which is followed as far as possible.

    Nothing else is checked: CIDs and sizes may be wrong, extents missing.
    """
    descent = Descent()
    owner: Path | None = None
    with contextlib.suppress(CorruptChain, FormatError, Unsupported, OSError):
        while descent.obstacle(path) is None:
            if path.samefile(image):
                return True
            file = PosixFile.open(path)
            try:
                if owner is not None:
                    check_opened(resolver, owner, file, "parent")
                descriptor = read_descriptor(file)[0]
            finally:
                file.close()
            parent = find_parent(descriptor, resolver)
            if parent is None:
                return False
            owner, path = path, parent
    return False


def _refuse_pending(image: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        with os.scandir(image.parent) as entries:
            pending = any(entry.name.endswith(".intent") for entry in entries)
        if pending:
            from qemu_vmdk_snap.storage.journal.record import refuse_pending  # JSON and more: rarely needed

            refuse_pending(image)
