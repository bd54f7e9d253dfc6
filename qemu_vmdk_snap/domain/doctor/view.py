"""A domain as the doctor sees it: what libvirt, the files and QEMU say of it, read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import libvirt_errors
from qemu_vmdk_snap.domain.needs.needed import Needed, same_file
from qemu_vmdk_snap.domain.qemu.depth import max_links
from qemu_vmdk_snap.domain.state import inactive_xml, lenient, volume_resolver
from qemu_vmdk_snap.domain.xml.kept import kept_branches
from qemu_vmdk_snap.domain.xml.named import folders_named
from qemu_vmdk_snap.errors import CidMismatch, VmdkSnapError

if TYPE_CHECKING:
    import libvirt


@dataclass(frozen=True, slots=True)
class View:
    """What there is to say of one domain is said from this."""

    conn: libvirt.virConnect
    domain: libvirt.virDomain
    name: str
    uuid: str
    text: str
    """The persistent XML, secrets included."""
    disks: tuple[xml.Disk, ...]
    snapshots: Mapping[str, xml.SnapshotXml]
    texts: Mapping[str, str]
    """name -> XML of each snapshot, secrets included."""
    current: str | None
    needed: Needed
    volume_path: xml.VolumePath
    folders: tuple[Path, ...]
    """Those of the files that its XML and its snapshots name: chains may lie in them."""
    limit: int
    """How many links this libvirt starts."""
    chains: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    """target -> the active chain by its files, where it holds together."""

    @classmethod
    def read(cls, conn: libvirt.virConnect, domain: libvirt.virDomain) -> View:
        """Look at everything.

        Raises:
            DomainError: libvirt reports an error.
            StillNeeded: a folder cannot be listed.
        """
        import libvirt

        name, secure = domain.name(), libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE
        volume_path = lenient(volume_resolver(conn, name))
        with libvirt_errors(name, "read its XML and snapshots"):
            text = inactive_xml(domain)
            texts = {one.getName(): one.getXMLDesc(secure) for one in domain.listAllSnapshots()}
            current = domain.snapshotCurrent().getName() if domain.hasCurrentSnapshot() else None
            limit = max_links(conn.getLibVersion())
        return cls(
            conn,
            domain,
            name,
            domain.UUIDString(),
            text,
            tuple(xml.list_disks(text, volume_path)),
            {one: xml.parse_snapshot(each, volume_path) for one, each in texts.items()},
            texts,
            current,
            Needed.read(conn, domain),
            volume_path,
            tuple(folders_named(volume_path, text, *texts.values())),
            limit,
        )

    def links(self, top: Path) -> tuple[tuple[engine.LinkFacts, ...] | None, str, CidMismatch | None]:
        """Return the links of a chain; or None, why it does not hold together, and the CIDs that do not fit."""
        try:
            with engine.allowing(*self.folders, below=False):
                return engine.read_links(top), "", None
        except CidMismatch as error:
            return None, str(error), error
        except VmdkSnapError as error:
            return None, str(error), None
        except OSError as error:
            return None, f"{error.filename or top}: {error.strerror}", None

    def frozen_by(self, path: Path) -> str | None:
        """Return the snapshot that froze the file."""
        for snapshot in self.snapshots.values():
            for disk in snapshot.disks:
                if disk.mode == "external" and disk.frozen is not None and same_file(disk.frozen, path):
                    return snapshot.name
        return None

    def overlays_on(self, path: Path) -> list[Path]:
        """Return the images that are backed by the file, in any format."""
        return [one.path for one in self.needed.census.dependents([path]) if one.how == "parent"]

    def kept(self) -> set[Path]:
        """Return the files that reverts have kept."""
        return set(kept_branches(self.text))

    def successors(self, top: Path) -> list[Path]:
        """Return the tops that a disk may have continued in since `top` was one: what ends the branches on it.

        What a revert has kept, and what a snapshot froze, is no such top.
        """
        kept = {path.resolve() for path in self.kept()}
        found, waiting, seen = [], [top], set[Path]()
        while waiting:
            here = waiting.pop()
            if here in seen or here.resolve() in kept:
                continue
            seen.add(here)
            above = self.overlays_on(here)
            waiting += above
            if not above and self.frozen_by(here) is None:
                found.append(here)
        return found
