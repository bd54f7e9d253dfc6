"""Register snapshots that were made before: by VMware, or by hand with overlays. The disks' files are only read.

Each link below the top of a disk was frozen by a snapshot. Names, dates and parents come from VMware's dictionary
(`.vmsd`) if there is one; else links of the same height on several disks are treated as one snapshot, named after its
file and dated by the last write to it.

If it is killed at any point, what is registered is right, and running it again adopts the rest.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import xml.etree.ElementTree as ET
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.adopt.vmsd import Vmsd, read_vmsd
from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.journal.recover import recover_domain
from qemu_vmdk_snap.domain.needs.needed import place_in, same_file
from qemu_vmdk_snap.domain.needs.orphans import find_orphans, remove_orphan
from qemu_vmdk_snap.domain.overlay.naming import next_overlay
from qemu_vmdk_snap.domain.overlay.newfile import make_overlay
from qemu_vmdk_snap.domain.overlay.planned import PlannedDisk
from qemu_vmdk_snap.domain.registration import register_text
from qemu_vmdk_snap.domain.state import define, inactive_xml, named_folders, volume_resolver
from qemu_vmdk_snap.errors import DomainError, VmdkSnapError

if TYPE_CHECKING:
    import libvirt

_QEMU_NAMESPACE: Final = "http://libvirt.org/schemas/domain/qemu/1.0"
_MAX_NAME: Final = 200


@dataclass(frozen=True, slots=True)
class Adopted:
    """A snapshot that was registered, or would be."""

    name: str
    creation_time: int
    """Seconds since 1970."""
    parent: str | None
    description: str | None
    frozen: Mapping[str, Path]
    """Target -> the frozen file."""

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types."""
        return {
            "name": self.name,
            "creation-time": self.creation_time,
            "parent": self.parent,
            "description": self.description,
            "frozen": {target: str(path) for target, path in self.frozen.items()},
        }


@dataclass(frozen=True, slots=True)
class AdoptReport:
    """What an adoption did."""

    domain: str
    adopted: tuple[Adopted, ...]
    passed: tuple[tuple[str, str], ...]
    """(name, reason) of VMware's snapshots that could not be registered."""
    spelt_out: tuple[str, ...]
    """Disks whose chain the domain's XML names now; without that libvirt starts no chain of three."""
    vmsd: Path | None
    dry_run: bool = False
    """Whether this is only what would be done."""

    @property
    def changed(self) -> bool:
        """Whether anything was changed."""
        return bool(self.adopted or self.spelt_out) and not self.dry_run

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types, as `snapshot adopt --output=json` shows it."""
        return {
            "domain": self.domain,
            "adopted": [one.as_dict() for one in self.adopted],
            "spelt-out": list(self.spelt_out),
            "left-out": [{"name": name, "reason": reason} for name, reason in self.passed],
            "vmsd": None if self.vmsd is None else str(self.vmsd),
        } | ({"dry-run": True} if self.dry_run else {})


@dataclass(frozen=True, slots=True)
class Settled:
    """What was done with an orphan."""

    path: Path
    snapshot: str | None
    """The snapshot that it was registered as; None: it was removed."""

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types."""
        return {"path": str(self.path), "snapshot": self.snapshot}


@dataclass(slots=True)
class _Wish:
    """A snapshot to be registered."""

    key: object
    """The key by which others name it as their parent."""
    name: str
    description: str | None
    creation_time: int
    parent: object
    frozen: dict[str, Path]


@dataclass(slots=True)
class _Registry:
    """The domain: its disks' chains, and its snapshots."""

    domain: libvirt.virDomain
    text: str
    disks: list[xml.Disk]
    chains: dict[str, tuple[Path, ...]]
    """target -> the active chain, the top first."""
    snapshots: list[xml.SnapshotXml]
    current: str | None

    def frozen_by(self, target: str, path: Path) -> str | None:
        """Return the name of the snapshot that froze the file of this disk."""
        for snapshot in self.snapshots:
            for disk in snapshot.disks:
                if disk.target == target and disk.mode == "external" and disk.frozen and same_file(disk.frozen, path):
                    return snapshot.name
        return None

    def folders(self) -> list[Path]:
        """Return where its files lie."""
        return sorted({path.parent for chain in self.chains.values() for path in chain})

    def chain_of(self, path: Path) -> tuple[Path, ...]:
        """Return the files of an image of the domain, the top first."""
        return tuple(link.path for link in engine.read_links(path, trusted_dirs=self.folders()))

    def target_of(self, path: Path) -> str | None:
        """Return the disk that the image belongs to: the one with the same base."""
        base = self.chain_of(path)[-1]
        return next((target for target, chain in self.chains.items() if same_file(chain[-1], base)), None)


def adopt(
    conn: libvirt.virConnect, domain_name: str, *, vmsd: Path | None = None, dry_run: bool = False
) -> AdoptReport:
    """Register a snapshot for each frozen link of the domain's disks that has none yet.

    `vmsd` is VMware's dictionary; by default the one beside the disks that names their files.

    Raises:
        DomainError: there is no such domain, another command changes its snapshots, or libvirt refuses.
        FormatError: the dictionary that was given cannot be read.
        CidMismatch, CorruptChain, FormatError, OSError: a chain is broken.
    """
    domain = find_domain(conn, domain_name)
    store = IntentStore.of(conn)
    allowed = engine.allowing(*named_folders(conn, domain), below=False)
    with store.locked(domain.UUIDString(), domain.name()), allowed:
        recover_domain(conn, domain, store)
        registry = _look(conn, domain)
        dictionary = read_vmsd(vmsd) if vmsd is not None else _find_vmsd(registry)
        passed: list[tuple[str, str]] = []
        wishes = _from_files(registry) if dictionary is None else _from_vmsd(registry, dictionary, passed)
        current = None if dictionary is None else dictionary.current
        spelt_out = _spell_out(conn, registry, dry_run=dry_run)
        adopted = _register_all(registry, wishes, current, dry_run=dry_run)
        if not dry_run:
            _reparent(registry)
    path = None if dictionary is None else dictionary.path
    return AdoptReport(domain.name(), tuple(adopted), tuple(passed), spelt_out, path, dry_run=dry_run)


def adopt_orphan(conn: libvirt.virConnect, domain: libvirt.virDomain, path: Path) -> str:
    """Register an image that is backed by the domain's files as a snapshot, and return its name.

    Raises:
        DomainError: it belongs to none of the domain's disks, or is registered already.
        VmdkSnapError, OSError: see `adopt`.
    """
    store = IntentStore.of(conn)
    allowed = engine.allowing(*named_folders(conn, domain), below=False)
    with store.locked(domain.UUIDString(), domain.name()), allowed:
        recover_domain(conn, domain, store)
        registry = _look(conn, domain)
        target = registry.target_of(path)
        if target is None:
            raise DomainError(domain.name(), f"{path} is not in the chain of any of its disks")
        if registry.frozen_by(target, path) is not None or place_in(registry.chains[target], path) is not None:
            raise DomainError(domain.name(), f"{path} is in use by it, or registered already")
        wish = _Wish(None, _name_of(path), "found without a snapshot", _written(path), None, {target: path})
        (adopted,) = _register_all(registry, [wish], current=None, dry_run=False)
    return adopted.name


def settle_orphans(
    conn: libvirt.virConnect,
    domain_name: str,
    *,
    discard: Sequence[Path] = (),
    remove: bool = False,
    adopt: bool = False,
    orphans: Sequence[Path] = (),
) -> list[Settled]:
    """Remove the orphans in `discard`, and with `remove` those that are empty; with `adopt` register the others.

    `orphans` are files that need what is removed and are given up.

    Raises:
        VmdkSnapError, OSError: see `remove_orphan` and `adopt_orphan`; what was done before stays done.
    """
    domain = find_domain(conn, domain_name)
    done = []
    for path in discard:
        remove_orphan(conn, domain, path, with_data=True, orphans=orphans)
        done.append(Settled(path, None))
    if remove:
        for orphan in reversed(find_orphans(conn, domain)):  # an orphan is removed before the one that backs it
            if orphan.empty:
                remove_orphan(conn, domain, orphan.path, orphans=orphans)
                done.append(Settled(orphan.path, None))
    if adopt:
        for orphan in find_orphans(conn, domain):
            still = any(orphan.path == other.path for other in find_orphans(conn, domain))
            if orphan.problem is None and still:
                done.append(Settled(orphan.path, adopt_orphan(conn, domain, orphan.path)))
    return done


def _look(conn: libvirt.virConnect, domain: libvirt.virDomain) -> _Registry:
    name = domain.name()
    with libvirt_errors(name, "read its XML and snapshots"):
        text = inactive_xml(domain)
        snapshots = [xml.parse_snapshot(s.getXMLDesc(0)) for s in domain.listAllSnapshots()]
        current = domain.snapshotCurrent().getName() if domain.hasCurrentSnapshot() else None
    disks = [disk for disk in xml.list_disks(text, volume_resolver(conn, name)) if disk.refusal is None]
    chains = {}
    for disk in disks:
        if disk.path is not None:
            folders = sorted({path.parent for path in disk.backing})
            chains[disk.target] = tuple(link.path for link in engine.read_links(disk.path, trusted_dirs=folders))
    if not chains:
        raise DomainError(name, "has no VMDK disk")
    return _Registry(domain, text, disks, chains, snapshots, current)


def _from_files(registry: _Registry) -> list[_Wish]:
    """Return a snapshot for each height of the chains, from the bases up, leaving out what is registered."""
    wishes = []
    for height in range(max(map(len, registry.chains.values())) - 1):
        frozen = {
            target: chain[-1 - height]
            for target, chain in registry.chains.items()
            if height < len(chain) - 1 and registry.frozen_by(target, chain[-1 - height]) is None
        }
        if frozen:
            first = next(iter(frozen.values()))
            newest = max(map(_written, frozen.values()))
            wishes.append(_Wish(height, _name_of(first), None, newest, height - 1, frozen))
    return wishes


def _find_vmsd(registry: _Registry) -> Vmsd | None:
    """Return the dictionary beside the disks that names one of their files."""
    files = [path for chain in registry.chains.values() for path in chain]
    for folder in registry.folders():
        for path in sorted(folder.glob("*.vmsd")):
            with contextlib.suppress(VmdkSnapError, OSError):
                vmsd = read_vmsd(path)
                if any(place_in(files, file) is not None for snapshot in vmsd.snapshots for file in snapshot.files):
                    return vmsd
    return None


def _from_vmsd(registry: _Registry, vmsd: Vmsd, passed: list[tuple[str, str]]) -> list[_Wish]:
    wishes = []
    parents: dict[str | None, str | None] = {}
    for snapshot in vmsd.snapshots:
        frozen: dict[str, Path] = {}
        reason = "names no file of the domain's disks"
        for file in snapshot.files:
            try:
                target = registry.target_of(file)
            except VmdkSnapError as error:
                reason = str(error)
                continue
            except OSError as error:
                reason = f"{error.filename or file}: {error.strerror}"
                continue
            if target is not None and registry.frozen_by(target, file) is None:
                frozen[target] = file
            elif target is not None:
                reason = "is registered already"
        parent = parents.get(snapshot.parent, snapshot.parent)
        if not frozen:
            parents[snapshot.uid] = parent  # its children have its parent now
            passed.append((snapshot.name, reason))
            continue
        time = snapshot.creation_time or max(map(_written, frozen.values()))
        wishes.append(_Wish(snapshot.uid, snapshot.name, snapshot.description, time, parent, frozen))
    return wishes


def _register_all(registry: _Registry, wishes: Sequence[_Wish], current: object, *, dry_run: bool) -> list[Adopted]:
    """Register the wishes, which have parents before children; return what was registered."""
    taken = {snapshot.name for snapshot in registry.snapshots}
    names: dict[object, str] = {}
    adopted = []
    for wish in wishes:
        name = _free_name(wish.name, taken)
        taken.add(name)
        names[wish.key] = name
        known = None if wish.parent is None else names.get(wish.parent)
        parent = known or _parent_by_files(registry, wish)
        one = Adopted(name, wish.creation_time, parent, wish.description, wish.frozen)
        adopted.append(one)
        is_current = registry.current is None and (
            wish.key == current if current is not None else _is_below_the_tops(registry, wish)
        )
        if not dry_run:
            _register(registry, one, current=is_current)
        registry.snapshots.append(
            xml.SnapshotXml(
                name, "shutoff", wish.creation_time, wish.description, parent,
                disks=tuple(xml.SnapshotDisk(target, "external", None, path) for target, path in wish.frozen.items()),
            )
        )  # fmt: skip
    return adopted


def _parent_by_files(registry: _Registry, wish: _Wish) -> str | None:
    """Return the snapshot that froze the nearest file below."""
    for target, path in wish.frozen.items():
        for below in registry.chain_of(path)[1:]:
            name = registry.frozen_by(target, below)
            if name is not None:
                return name
    return None


def _is_below_the_tops(registry: _Registry, wish: _Wish) -> bool:
    return any(
        len(registry.chains[target]) > 1 and same_file(registry.chains[target][1], path)
        for target, path in wish.frozen.items()
    )


def _register(registry: _Registry, one: Adopted, *, current: bool) -> None:
    chains = {target: registry.chain_of(path) for target, path in one.frozen.items()}
    entries = []
    for disk in registry.disks:
        frozen = one.frozen.get(disk.target)
        overlay = None if frozen is None else _overlay_on(registry, disk.target, frozen)
        entries.append(xml.SnapshotDisk(disk.target, "no" if frozen is None else "external", overlay, frozen))
    snapshot = xml.SnapshotXml(
        one.name, "shutoff", one.creation_time, one.description, one.parent, "no", tuple(entries)
    )
    text = xml.snapshot_xml(snapshot, _with_chains(registry.text, chains))
    with libvirt_errors(registry.domain.name(), f"register the snapshot {one.name!r}"):
        register_text(registry.domain, text, current=current)


def _overlay_on(registry: _Registry, target: str, frozen: Path) -> Path:
    """Return the overlay that was created when the file was frozen: that of the active chain, another, or a new one.

    VMware deletes the top of a branch that it leaves; libvirt's metadata always has one.
    """
    chain = registry.chains[target]
    for above, below in itertools.pairwise(chain):
        if same_file(below, frozen):
            return above
    find = engine.confined(registry.folders())
    for path in sorted(frozen.parent.iterdir()):
        with contextlib.suppress(VmdkSnapError, OSError):
            if not path.name.startswith(".") and path.is_file() and not same_file(path, frozen):
                facts = engine.read_facts(path, resolver=find)
                if facts.hint is not None and same_file(find(path, facts.hint, "parent"), frozen):
                    return path
    overlay = next_overlay(frozen, _named(registry))
    make_overlay(registry.domain.name(), PlannedDisk(target, overlay, (frozen,)))
    return overlay


def _named(registry: _Registry) -> set[Path]:
    files = xml.files_in(registry.text)
    for snapshot in registry.snapshots:
        files |= {path for disk in snapshot.disks for path in (disk.frozen, disk.overlay) if path is not None}
    return files


def _with_chains(domain_xml: str, chains: Mapping[str, Sequence[Path]]) -> str:
    """Return the domain with these chains on the disks named by target, each complete."""
    ET.register_namespace("qemu", _QEMU_NAMESPACE)
    root = ET.fromstring(domain_xml)
    for disk in root.findall("./devices/disk"):
        target, source = disk.find("target"), disk.find("source")
        chain = chains.get("" if target is None else target.get("dev", ""))
        if chain is None or source is None:
            continue
        disk.set("type", "file")
        for name in ("pool", "volume", "mode", "index"):
            source.attrib.pop(name, None)
        source.set("file", str(chain[0]))
        for old in disk.findall("backingStore"):
            disk.remove(old)
        above = disk
        for path in chain[1:]:
            above = ET.SubElement(above, "backingStore", {"type": "file"})
            ET.SubElement(above, "format", {"type": "vmdk"})
            ET.SubElement(above, "source", {"file": str(path)})
        ET.SubElement(above, "backingStore")
    return ET.tostring(root, encoding="unicode")


def _spell_out(conn: libvirt.virConnect, registry: _Registry, *, dry_run: bool) -> tuple[str, ...]:
    """Let the persistent XML name the whole chain of each disk that has one; return the disks that changed."""
    tops = {
        disk.target: xml.NewTop(chain[0], chain[1:])
        for disk in registry.disks
        if not disk.closed and len(chain := registry.chains.get(disk.target, ())) > 1
    }
    if tops and not dry_run:
        registry.text = xml.stack(registry.text, tops)
        with libvirt_errors(registry.domain.name(), "define it with its whole chains"):
            define(conn, registry.text)
    return tuple(tops)


def _reparent(registry: _Registry) -> None:
    """Make adopted snapshots the parents of snapshots that were roots."""
    import libvirt

    for snapshot in registry.snapshots:
        if snapshot.parent is not None:
            continue
        frozen = {disk.target: disk.frozen for disk in snapshot.disks if disk.mode == "external" and disk.frozen}
        wish = _Wish(None, snapshot.name, None, 0, None, {t: p for t, p in frozen.items() if t in registry.chains})
        try:
            parent = _parent_by_files(registry, wish)
        except (VmdkSnapError, OSError):
            continue  # its files are gone or broken: its parent is unknown
        if parent is None:
            continue
        with libvirt_errors(registry.domain.name(), f"make {parent!r} the parent of the snapshot {snapshot.name!r}"):
            known = registry.domain.snapshotLookupByName(snapshot.name)
            root = ET.fromstring(known.getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE))
            ET.SubElement(ET.SubElement(root, "parent"), "name").text = parent
            text = ET.tostring(root, encoding="unicode")
            register_text(registry.domain, text, current=snapshot.name == registry.current)


def _free_name(wanted: str, taken: Collection[str]) -> str:
    """Return a name like the wanted one that libvirt can use as a file name."""
    kept = "".join(char if char.isprintable() and char != "/" else "-" for char in wanted)
    kept = kept.strip().lstrip(".").strip() or "snapshot"
    while len(os.fsencode(kept)) > _MAX_NAME:
        kept = kept[:-1]
    name, number = kept, 2
    while name in taken:
        name, number = f"{kept} ({number})", number + 1
    return name


def _name_of(path: Path) -> str:
    return path.name.removesuffix(".vmdk")


def _written(path: Path) -> int:
    return int(path.stat().st_mtime)
