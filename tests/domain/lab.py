"""Domains to experiment on: in a libvirt inside the test's own process, or in a private daemon."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_vmdk_snap import create_image, open_chain

if TYPE_CHECKING:
    import libvirt

MIB = 1 << 20
_numbers = itertools.count(1)


class Lab:
    """One libvirt connection, a folder for images, and the domains made in it."""

    def __init__(self, conn: libvirt.virConnect, folder: Path, uri: str) -> None:
        self.conn = conn
        self.folder = folder
        self.uri = uri
        self._domains: list[str] = []

    def disk(self, name: str = "a", folder: Path | None = None, size: int = 4 * MIB) -> Path:
        """Return a new VMDK disk with a few bytes of its own."""
        path = (folder or self.folder) / f"{name}.vmdk"
        create_image(path, size, durable=False)
        with open_chain(path, writable=True) as chain:
            chain.write_at(0, f"base {name}".encode().ljust(512, b"."))
        return path

    def define(self, *disks: Path, extra: str = "", disk_xml: Mapping[str, str] | None = None) -> libvirt.virDomain:
        """Return a new shut-off domain with these VMDK disks as vda, vdb, ..."""
        name = f"d{next(_numbers)}"
        targets = [f"vd{letter}" for letter in "abcdefgh"][: len(disks)]
        elements = "".join(
            f"<disk type='file' device='disk'><driver name='qemu' type='vmdk'/><source file='{path}'/>"
            f"<target dev='{target}' bus='virtio'/>{(disk_xml or {}).get(target, '')}</disk>"
            for target, path in zip(targets, disks, strict=True)
        )
        self._domains.append(name)
        return self.conn.defineXML(
            f"<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>{name}</name>"
            "<metadata><app:note xmlns:app='urn:example:note'><app:by who='me'/></app:note></metadata>"
            "<memory unit='MiB'>32</memory><os><type arch='x86_64'>hvm</type></os><devices>"
            f"{elements}{extra}<graphics type='vnc' passwd='secret'><listen type='none'/></graphics></devices>"
            "<qemu:commandline><qemu:arg value='-no-reboot'/></qemu:commandline></domain>"
        )

    def adopt(self, name: str) -> None:
        """Take care of a domain that somebody else has defined, or renamed."""
        self._domains.append(name)

    def close(self, *kept: libvirt.virDomain) -> None:
        """Stop and forget the domains, but those that are kept."""
        import libvirt

        stay = {domain.name() for domain in kept}
        for domain in self.conn.listAllDomains():
            if domain.name() in self._domains and domain.name() not in stay:
                if domain.isActive():
                    domain.destroy()
                keep_nvram = libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM
                domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA | keep_nvram)


def xml_of(domain: libvirt.virDomain) -> str:
    """Return the persistent XML, secrets included."""
    import libvirt

    text: str = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
    return text


def contents(*folders: Path) -> dict[str, str]:
    """Return name and digest of every file below the folders, hidden ones included."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
