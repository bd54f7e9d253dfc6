"""Changes of descriptors in an operation record, so that one torn by a crash is written again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from qemu_vmdk_snap.chain.link import Link
from qemu_vmdk_snap.errors import Unsupported
from qemu_vmdk_snap.light import dataclass
from qemu_vmdk_snap.storage.blockfile import BlockFile, FileOpener
from qemu_vmdk_snap.storage.opening import open_locked
from qemu_vmdk_snap.storage.record import from_text, to_text
from qemu_vmdk_snap.units import SECTOR_SIZE, sector_bytes
from qemu_vmdk_snap.vmdk.descriptor import Descriptor
from qemu_vmdk_snap.vmdk.sparse.header import SparseExtentHeader


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
        """Return the change of `link`'s descriptor to `new`; comments go where its room would not do otherwise.

        Raises:
            Unsupported: it does not fit into the room that the header gives it.
        """
        if new.base:
            header = SparseExtentHeader.parse(link.file.read_at(0, SECTOR_SIZE), path=link.path)
            room = sector_bytes(header.descriptor_size)
            if len(new.raw) > room:
                new = new.condensed()
            if len(new.raw) > room:
                raise Unsupported(link.path, f"a descriptor of {len(new.raw)} bytes does not fit into its {room} bytes")
        return cls(link.path.parent.resolve() / link.path.name, new.base, link.descriptor.raw, new.raw)

    def write(self, file: BlockFile) -> None:
        """Store the new text, durably, even over a mixture of both."""
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
        file = open_locked(self.path, opener, writable=True)
        try:
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
        """Return the change as an operation record stores it."""
        return {"path": self.path, "base": self.base, "old": to_text(self.old), "new": to_text(self.new)}

    @classmethod
    def from_detail(cls, detail: dict[str, Any]) -> Self:
        """Return the change from the result of `as_detail`."""
        return cls(Path(detail["path"]), int(detail["base"]), from_text(detail["old"]), from_text(detail["new"]))


@contextlib.contextmanager
def changing_child_of(parent: Path) -> Iterator[None]:
    """Add to an Unsupported error for a child, in the block, why the child must change."""
    try:
        yield
    except Unsupported as error:
        why = f"it is backed by {parent}, and would no longer read the same: move it to another folder, or delete it"
        raise Unsupported(error.path, f"{error.feature}; {why}") from error
