"""Who needs the overlays that a start empties: read from the files of libvirt's drivers, as a hook must not call it.

The XML on standard input has the disks of the domain itself; files of libvirt's drivers have those of the others and
of snapshots. It fails closed: an XML that cannot be read may name anything.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from qemu_vmdk_snap.domain.needs.needed import NOTHING, Holder, Needed, Walk, holders_in, require_none, same_file
from qemu_vmdk_snap.domain.state import volume_by_pool_xml
from qemu_vmdk_snap.domain.xml.served import direct_view
from qemu_vmdk_snap.errors import DomainError, InvalidRequest


class Drivers(NamedTuple):
    """Where libvirt's drivers keep their files; a missing folder has none."""

    domains: Path
    """Persistent XML: NAME.xml."""
    running: Path
    """Of running domains: NAME.xml."""
    snapshots: Path
    """DOMAIN/NAME.xml."""
    pools: Path
    """NAME.xml."""


def drivers() -> Drivers:
    """Return the folders of the daemon that this user's hooks belong to.

    Raises:
        InvalidRequest: the user has no home, so they are not known.
    """
    if os.geteuid() == 0:
        etc = Path("/etc/libvirt")
        return Drivers(etc / "qemu", Path("/run/libvirt/qemu"), Path("/var/lib/libvirt/qemu/snapshot"), etc / "storage")
    try:
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "libvirt"
    except RuntimeError:
        raise InvalidRequest("hook", "this user has no home: set HOME, or XDG_CONFIG_HOME") from None
    run = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nowhere") / "libvirt"
    return Drivers(home / "qemu", run / "qemu", home / "qemu" / "lib" / "snapshot", home / "storage")


def require_tops_unneeded(tops: Sequence[Path], domain_xml: str) -> None:
    """Require that nothing needs the tops of the domain except the domain itself, as tops.

    Raises:
        StillNeeded: something else needs one, or may.
        DomainError: an XML cannot be read.
    """
    places = drivers()
    own = ET.fromstring(domain_xml).findtext("uuid", "")
    holders = [*_holders(domain_xml, "domain", places, None), *_all(places)]
    needed = Needed.of([one for one in holders if one.uuid != own or one.chain.role != "overlay"])
    for top in tops:

        def is_top(holder: Holder, walk: Walk, top: Path = top) -> bool:
            return holder.uuid == own and holder.snapshot is None and same_file(walk.files[0], top)

        found = [*needed.holding([top], needed.holders, NOTHING, settled=is_top)]
        require_none(top, [*found, *needed.around([top], [], NOTHING)])


def _all(places: Drivers) -> Iterator[Holder]:
    for path in [*_xml_files(places.domains), *_xml_files(places.running)]:
        yield from _holders(_read(path), "domain", places, None)
    if places.snapshots.is_dir():
        for folder in sorted(places.snapshots.iterdir()):
            for path in _xml_files(folder):
                yield from _holders(_read(path), f"snapshot {path.stem} of domain", places, path.stem)


def _xml_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ".xml") if folder.is_dir() else []


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return "<domain/>"  # it has just been removed
    except (OSError, ValueError) as error:
        raise DomainError(path.stem, f"what it names cannot be determined: {path}: {error}") from error


def _holders(text: str, owner: str, places: Drivers, snapshot: str | None) -> Iterator[Holder]:
    def volume_path(pool: str, volume: str) -> Path:
        return volume_by_pool_xml(pool, _read(places.pools / f"{pool}.xml"), pool, volume)

    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        raise DomainError(owner, f"its XML cannot be read: {error}") from error
    domain = root if root.tag == "domain" else root.find("domain")
    if domain is not None:
        name, uuid = domain.findtext("name", ""), domain.findtext("uuid", "")
        yield from holders_in(direct_view(text), uuid, f"{owner} {name}", volume_path, snapshot)
