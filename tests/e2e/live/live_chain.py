"""A running guest on chains of several links, and exchanges below it with images that the engine merges."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qemu_vmdk_snap import create_image, open_chain, read_facts, rebase
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.qemu.exchange import Exchange
from qemu_vmdk_snap.domain.qemu.monitor import Monitor
from qemu_vmdk_snap.domain.qemu.options import read_options
from qemu_vmdk_snap.domain.xml import list_disks, relink
from tests.domain.lab import xml_of
from tests.e2e.live.live_guest import MIB, REGION, STARTS, boot_disk, domain_xml, start

if TYPE_CHECKING:
    import libvirt

    from qemu_vmdk_snap.harness import ProbeSession

_numbers = itertools.count(1)
SEEN: Final = (*((start, REGION) for start in STARTS), (6 * MIB, 512), (7 * MIB, 640 * 1024))
"""Where something was written, by the guest or before it started: (offset, bytes)."""
SIZE: Final = 10 * MIB


class ChainGuest:
    """A guest whose disks have a chain of `links` when it starts; every link has data of its own.

    Its disks are a SATA one that it boots from and, by `disks=2`, a virtio one; or what `text` defines on a.vmdk.
    """

    def __init__(
        self, conn: libvirt.virConnect, folder: Path, *, links: int = 4, disks: int = 1, text: str | None = None
    ) -> None:
        self.conn, self.folder, self.serial = conn, folder, folder / "serial"
        self.name = f"chain{next(_numbers)}"
        self._places: dict[Path, Path] = {}
        boot_disk(folder / "a.vmdk", SIZE)
        if disks > 1:
            create_image(folder / "b.vmdk", 8 * MIB, durable=False)
        files = [folder / f"{letter}.vmdk" for letter in "ab"[:disks]]
        self.domain = conn.defineXML(text or domain_xml(self.name, files, self.serial))
        self.name = self.domain.name()
        for number in range(1, links):
            self.fill(number)
            create_snapshot(conn, self.name, f"off{number}")
        self.fill(links)
        self.probe = self.start()

    def fill(self, number: int) -> None:
        """Write to the top of each disk: one range of its own, and a part of what the link below has."""
        for disk in self.disks.values():
            with open_chain(disk[0], writable=True) as chain:
                chain.write_at(7 * MIB + (number % 8) * 96 * 1024, bytes([number]) * 160 * 1024)
                chain.write_at(6 * MIB, bytes([0x40 + number]) * 512)

    @property
    def disks(self) -> dict[str, tuple[Path, ...]]:
        """The files of each disk, the top first, as the persistent XML has them."""
        found = {}
        for disk in list_disks(xml_of(self.domain)):
            assert disk.path is not None
            found[disk.target] = (disk.path, *disk.backing)
        return found

    @property
    def monitor(self) -> Monitor:
        """QEMU's monitor."""
        return Monitor(self.domain)

    def start(self) -> ProbeSession:
        """Start the guest; return the session with its probe."""
        self.probe = start(self.domain, self.serial)
        return self.probe

    def exchange(self, target: str, upper: int, below: int | None, *, cut: int | None = None) -> Exchange:
        """Return an exchange of what is between two links, counted from the base, with a merged image beside it.

        With `cut` it is two images: what is above that link, and what is from it on.
        """
        files = self.disks[target][::-1]
        images: list[Path] = []
        at = below
        for last in [upper - 1] if cut is None else [cut, upper - 1]:
            image = self.folder / f"m{next(_numbers)}.vmdk"
            # The upper image names the link below it as that will be called, by the name of the one it replaces.
            images.insert(0, merge(files[last], None if at is None else files[at], image))
            self._places[image] = files[last]
            at = last
        options = read_options(self.domain.XMLDesc(0))[target]
        return Exchange(target, files[upper], tuple(images), None if below is None else files[below], options)

    def adopt(self, exchanges: Sequence[Exchange]) -> None:
        """Let images take the names of the links that they replaced, and the persistent XML name the new chains."""
        gone: set[Path] = set()
        for one in exchanges:
            files = next(chain for chain in self.disks.values() if one.upper in chain)
            end = len(files) if one.below is None else files.index(one.below)
            removed = set(files[files.index(one.upper) + 1 : end])
            for image in one.images:
                image.replace(self._places[image])
                removed.discard(self._places[image])
            for path in removed:
                path.unlink()
            gone |= removed
        text = relink(xml_of(self.domain), lambda chain: [path for path in chain if path not in gone])
        self.conn.defineXML(text)

    def guest_sees(self) -> dict[int, int]:
        """Return the checksums of the boot disk as the guest reads it, by offset."""
        return {at: self.probe.crc(at, size) for at, size in SEEN}

    def close(self) -> None:
        """Stop and forget the guest."""
        import libvirt

        self.probe.close()
        if self.domain.isActive():
            self.domain.destroy()
        self.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)


def merge(top: Path, below: Path | None, image: Path) -> Path:
    """Make an image that reads as `top` does, with its CID, and is backed by `below` or by nothing."""
    shutil.copy(top, image)
    rebase(image, below)
    assert read_facts(image).cid == read_facts(top).cid
    assert content(image) == content(top)
    return image


def content(path: Path) -> int:
    """Return the checksum of what the engine reads from the image."""
    with open_chain(path, lock=False) as chain:
        return zlib.crc32(chain.read_at(0, chain.capacity))


def content_by_qemu(path: Path) -> int:
    """Return the checksum of what qemu-img reads from the image."""
    raw = path.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-U", "-f", "vmdk", "-O", "raw", path, raw], check=True, timeout=60)
    data = raw.read_bytes()
    raw.unlink()
    return zlib.crc32(data)


def both(files: Sequence[Path]) -> Mapping[Path, tuple[int, int]]:
    """Return what the engine and what qemu-img read from each of the images."""
    return {path: (content(path), content_by_qemu(path)) for path in files}


def sums(path: Path) -> dict[int, int]:
    """Return the checksums of the image as the engine reads it, as `guest_sees` does."""
    with open_chain(path, lock=False) as chain:
        return {at: zlib.crc32(chain.read_at(at, size)) for at, size in SEEN}
