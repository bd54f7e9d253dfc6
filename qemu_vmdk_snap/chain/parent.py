"""Where an image's parent is: the rules that everything which walks a chain shares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qemu_vmdk_snap.errors import CorruptChain, MissingFile
from qemu_vmdk_snap.light import Final, Literal
from qemu_vmdk_snap.vmdk.descriptor import NO_PARENT, Descriptor

MAX_DEPTH: Final = 256
"""No chain is deeper; a deeper one is refused before it uses up the file descriptors."""


class Descent:
    """The links that a walk from the top down has reached; it ends at a loop, and at `MAX_DEPTH`."""

    def __init__(self) -> None:
        self._seen: dict[Path, Path] = {}

    def obstacle(self, path: Path) -> Literal["loop", "depth"] | None:
        """Add the next link; return why the walk must end before it: it was reached already, or there are too many."""
        real = path.resolve()
        if real in self._seen:
            return "loop"
        if len(self._seen) == MAX_DEPTH:
            return "depth"
        self._seen[real] = path
        return None

    def step(self, path: Path) -> None:
        """Add the next link.

        Raises:
            CorruptChain: it is a loop, or too deep.
        """
        obstacle = self.obstacle(path)
        if obstacle == "loop":
            child = list(self._seen.values())[-1]
            raise CorruptChain(child, f"its parent {path} is already in the chain: the chain is a loop")
        if obstacle == "depth":
            raise CorruptChain(next(iter(self._seen.values())), f"the chain is deeper than {MAX_DEPTH} links")


def find_parent(descriptor: Descriptor, resolver: Callable[[Path, str, str], Path]) -> Path | None:
    """Return where the parent of the image is that `descriptor` belongs to; None where it is a base.

    QEMU takes whatever parentFileNameHint names for the parent and does not look at parentCID. Several writers give a
    base the CID ffffffff, which then is the parentCID of its overlays: so a hint that leads to a file names a parent,
    whatever parentCID says; one that leads nowhere does not where parentCID says that there is none.

    Raises:
        CorruptChain: it has a parent that is not named, is missing, or may not be opened.
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
