"""Where an image's parent is: the rules that every walk along a chain has in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from qemu_vmdk_snap.errors import CorruptChain, MissingFile
from qemu_vmdk_snap.vmdk.descriptor import NO_PARENT, Descriptor

MAX_DEPTH: Final = 256
"""No chain is deeper; a deeper one is refused before it uses up the file descriptors."""


def find_parent(descriptor: Descriptor, resolver: Callable[[Path, str, str], Path]) -> Path | None:
    """Return where the parent of the image is that `descriptor` belongs to; None where it is a base.

    QEMU takes whatever parentFileNameHint names for the parent and does not look at parentCID. Several writers give a
    base the CID ffffffff, which then is the parentCID of its overlays: so a hint that leads to a file names a parent,
    whatever parentCID says; one that leads nowhere does not where parentCID says that there is none.

    Raises:
        CorruptChain: there is a parent, and it is not named, is missing, or may not be opened.
    """
    hint = descriptor.parent_hint
    if descriptor.parent_cid != NO_PARENT:
        if hint is None:
            reason = f"parentCID = {descriptor.parent_cid:08x}, but no parentFileNameHint names the parent"
            raise CorruptChain(descriptor.path, reason)
        return resolver(descriptor.path, hint, "parent")
    if hint is None:
        return None
    try:
        return resolver(descriptor.path, hint, "parent")
    except MissingFile:
        return None
