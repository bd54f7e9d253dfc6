"""Changes of descriptors that an intent record can hold, so that one torn by a crash is written again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from qemu_vmdk_snap.chain.link import Link, new_cid
from qemu_vmdk_snap.errors import Unsupported
from qemu_vmdk_snap.storage.blockfile import BlockFile, FileOpener
from qemu_vmdk_snap.storage.intent import from_text, to_text
from qemu_vmdk_snap.storage.locks import lock_image
from qemu_vmdk_snap.units import SECTOR_SIZE, sector_bytes
from qemu_vmdk_snap.vmdk.descriptor import NO_PARENT, Descriptor
from qemu_vmdk_snap.vmdk.sparse.header import SparseExtentHeader

_MIN_CID_DIGITS = 5


@dataclass(frozen=True, slots=True)
class DescriptorChange:
    """One descriptor, before and after."""

    path: Path
    base: int
    """Byte of the file where the text begins; 0 is a file of its own."""
    old: bytes
    new: bytes

    @classmethod
    def plan(cls, link: Link, new: Descriptor) -> Self:
        """Return the change of `link`'s descriptor to `new`.

        Raises:
            Unsupported: it does not fit into the room that the header gives it.
        """
        if new.base:
            header = SparseExtentHeader.parse(link.file.read_at(0, SECTOR_SIZE), path=link.path)
            room = sector_bytes(header.descriptor_size)
            if len(new.raw) > room:
                raise Unsupported(link.path, f"a descriptor of {len(new.raw)} bytes does not fit into its {room} bytes")
        return cls(link.path.parent.resolve() / link.path.name, new.base, link.descriptor.raw, new.raw)

    def write(self, file: BlockFile) -> None:
        """Store the new text, durably, whatever mixture of both is there."""
        room = max(len(self.old), len(self.new)) if self.base else len(self.new)
        file.write_at(self.base, self.new + bytes(room - len(self.new)))
        if not self.base:
            file.truncate(len(self.new))
        file.flush()

    def apply(self, link: Link) -> None:
        """Store the new text in an open link."""
        self.write(link.file)
        link.descriptor = Descriptor.parse(self.new, path=link.path, base=self.base)

    def redo(self, opener: FileOpener) -> None:
        """Store the new text in an image that may be damaged by a crash in the middle of doing so."""
        file = opener(self.path, True)
        try:
            descriptor = file.fileno()
            if descriptor is not None:
                lock_image(descriptor, self.path, writable=True)
            self.write(file)
        finally:
            file.close()

    def is_pending(self, opener: FileOpener) -> bool:
        """Return whether the old text is still there, whole: the change has not begun."""
        file = opener(self.path, False)
        try:
            return file.read_at(self.base, len(self.old)) == self.old
        finally:
            file.close()

    def as_detail(self) -> dict[str, Any]:
        """Return the change as an intent record holds it."""
        return {"path": str(self.path), "base": self.base, "old": to_text(self.old), "new": to_text(self.new)}

    @classmethod
    def from_detail(cls, detail: dict[str, Any]) -> Self:
        """Return the change that `as_detail` gave."""
        return cls(Path(detail["path"]), int(detail["base"]), from_text(detail["old"]), from_text(detail["new"]))


def with_fresh_cid(descriptor: Descriptor) -> Descriptor:
    """Return `descriptor` with a new CID of as many digits as before, and longContentID in step."""
    value = descriptor.values["cid"]
    digits = value.end - value.start
    width = digits if _MIN_CID_DIGITS <= digits <= 8 else 8
    return with_cid(descriptor, new_cid(avoid=descriptor.cid, digits=width), width)


def with_cid(descriptor: Descriptor, cid: int, digits: int = 8) -> Descriptor:
    """Return `descriptor` with the CID, and longContentID in step with it."""
    changes = {"CID": f"{cid:0{digits}x}"}
    long_id = descriptor.get("ddb.longContentID")
    if long_id is not None and len(long_id) >= 8:
        changes["ddb.longContentID"] = f"{long_id[:-8]}{cid:08x}"
    return descriptor.with_values(changes)


def on_parent(descriptor: Descriptor, child: Path, parent: Path | None, parent_cid: int) -> Descriptor:
    """Return the descriptor of `child` for another parent, named from the child's folder; None makes it a base."""
    if parent is None:
        return descriptor.with_parent(NO_PARENT, None)
    return descriptor.with_parent(parent_cid, hint_to(child, parent))


@contextlib.contextmanager
def changing_child_of(parent: Path) -> Iterator[None]:
    """Say of a child that cannot be changed in the block why it would have to be: a delta beside its base, say."""
    try:
        yield
    except Unsupported as error:
        why = f"it stands on {parent}, and would no longer read the same: move it to another folder, or delete it"
        raise Unsupported(error.path, f"{error.feature}; {why}") from error


def hint_to(child: Path, parent: Path) -> str:
    """Return how `child` names `parent`: relative, as both may move together."""
    return os.path.relpath(parent.parent.resolve() / parent.name, child.parent.resolve())
