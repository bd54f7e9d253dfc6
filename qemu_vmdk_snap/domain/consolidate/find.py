"""Leftover links: images in the chain of a disk that neither the domain has on top nor any snapshot froze.

A snapshot whose metadata was deleted alone leaves one, as does a tool that was killed, or a disk that came with its
overlays from elsewhere. VMware calls such a disk one that needs consolidation.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from qemu_vmdk_snap import open_chain
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.delete.plan import State
from qemu_vmdk_snap.domain.needs.needed import place_in, real_file

_NUMBERED: Final = re.compile(r"(?P<stem>.+?)(-\d{6})?\.vmdk")


class Leftover(NamedTuple):
    """A leftover link."""

    target: str
    """The disk in whose chain it is."""
    path: Path
    child: Path
    """What is backed by it there."""
    chain: tuple[Path, ...]
    """The whole chain, the top first."""
    domain_xml: str
    """The XML of the domain, or of that inside a snapshot, that has the chain."""

    @property
    def is_numbered(self) -> bool:
        """Whether the child is called as an overlay of the link is: what backs anything else may be a template."""
        mine, above = _NUMBERED.fullmatch(self.path.name), _NUMBERED.fullmatch(self.child.name)
        named_alike = mine is not None and above is not None and mine["stem"] == above["stem"]
        return named_alike and self.path.parent == self.child.parent

    def as_snapshot(self, name: str) -> str:
        """Return the XML of a snapshot that has frozen the link: what would have to be deleted for it to go."""
        below = self.chain[self.chain.index(self.path) :]
        text = xml.relink(self.domain_xml, lambda files: below if files[0] == self.chain[0] else files)
        disk = xml.SnapshotDisk(self.target, "external", self.child, self.path)
        return xml.snapshot_xml(xml.SnapshotXml(name, "shutoff", 0, disks=(disk,)), text)


def find_leftovers(state: State, gone: Collection[Path] = ()) -> Iterator[Leftover]:
    """Yield the leftover links, each once, those nearest to a top first; `gone` are images that would be gone.

    Raises:
        VmdkSnapError, OSError: a chain cannot be opened.
    """
    texts = [state.domain_xml, *map(xml.domain_of, state.snapshots.values())]
    disks = [(disk, text) for text in texts for disk in xml.list_disks(text, state.volume_path) if disk.refusal is None]
    tops = [disk.path for disk, _ in disks if disk.path is not None]
    named = state.named()
    folders = sorted({home for path in named for home in (path.parent, real_file(path).parent)})
    seen: list[Path] = [*gone]
    for disk, text in disks:
        if disk.path is None or not disk.path.exists():
            continue
        chain = _chain(disk.path, folders, named)
        for child, link in itertools.pairwise(chain):
            if place_in(tops, link) is None and place_in(seen, link) is None:
                seen.append(link)
                yield Leftover(disk.target, link, child, chain, text)


def _chain(top: Path, folders: Sequence[Path], named: Sequence[Path]) -> tuple[Path, ...]:
    """Return the links, as the XML names them where it does."""
    with open_chain(top, trusted_dirs=folders, lock=False) as chain:
        links = [link.path for link in chain.links[1:]]
    places = [place_in(named, link) for link in links]
    return (top, *(link if at is None else named[at] for link, at in zip(links, places, strict=True)))
