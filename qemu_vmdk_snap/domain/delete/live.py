"""What deleting snapshots of a running guest does to its chains: worked out for all of them at once.

A disk's chain, the link that the guest writes to first: T, c1, c2, ... A link but T may go when no snapshot that stays
has it as its disk, and only the link above is backed by it. Neighbouring links that may go become one, together with
the link above them, whose name, CID and content the new image has. Links that earlier deletes have left go along. T
itself takes part only after a new overlay has frozen it.

    delete s2      T -> c1 (s3) -> c2 (s2) -> c3 (s1)      becomes      T -> new c1 -> c3
    delete s3      T -> c1 (s3) -> c2 (s2)                 becomes      new top -> new T -> c2

The new image costs as many bytes as it stores, where the file system cannot share them. So a link that is far larger
than what would be merged into it stays in the chain, unused but for its content, until as much has been written above:
an hourly delete does not copy the whole disk every hour, and the chain stays short all the same.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from qemu_vmdk_snap import identity_if_known, own_files, read_links
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.delete.plan import Planner, State, files_of, intent_of, memory_of, open_one
from qemu_vmdk_snap.domain.delete.work import Deleted, Work
from qemu_vmdk_snap.domain.journal.record import Intent, Merge
from qemu_vmdk_snap.domain.needs.needed import Holder, Walk, place_in, real_file, require_none, same_file
from qemu_vmdk_snap.domain.overlay.naming import next_overlay
from qemu_vmdk_snap.domain.xml.origin import refuse_foreign
from qemu_vmdk_snap.errors import VmdkSnapError

_CHEAP: Final = 256 << 20
"""Bytes that are copied without asking whether it is worth it: less than a second or two."""
_WORTH: Final = 2
"""A link that is larger than so many times what would be merged with it waits."""
Failed = list[tuple[str, "VmdkSnapError | OSError"]]
"""Snapshots that stay, and why."""

_FICLONE: Final = 0x40049409  # _IOW(0x94, 9, int)


@dataclass(frozen=True, slots=True)
class LivePlan:
    """Deletes under a running guest, in one step."""

    intent: Intent
    deleted: tuple[Deleted, ...]
    freeze: tuple[str, ...]
    """Disks whose top must be frozen by a new overlay first; the plan is then made once more."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Links that become one."""

    target: str
    chain: tuple[Path, ...]
    first: int
    last: int

    @property
    def links(self) -> tuple[Path, ...]:
        return self.chain[self.first : self.last + 1]

    @property
    def below(self) -> Path | None:
        return self.chain[self.last + 1] if self.last + 1 < len(self.chain) else None


def chains_of(state: State) -> dict[str, tuple[Path, ...]]:
    """Return the files of each VMDK disk of the domain, the top first, by their hints; a broken chain is left out."""
    found = {}
    for disk in xml.list_disks(state.domain_xml, state.volume_path):
        if disk.path is None or disk.refusal is not None:
            continue
        folders = sorted({disk.path.parent, *(path.parent for path in disk.backing)})
        try:
            links = read_links(disk.path, trusted_dirs=folders)
        except (VmdkSnapError, OSError):
            continue
        found[disk.target] = tuple(state.by_its_name(link.path) for link in links)
    return found


def live_ones(state: State, names: Sequence[str]) -> tuple[list[str], Failed]:
    """Return the snapshots of which a file is below a disk of the running guest, and those of them that have to stay.

    What is wrong with one of them holds up no other.
    """
    if not state.running:
        return [], []
    used = [path for files in chains_of(state).values() for path in files[1:]]
    used += [path for path in xml.files_in(state.domain_xml) if path not in used]
    files = {one for path in used if (one := identity_if_known(path)) is not None}
    found: list[str] = []
    failed: Failed = []
    for name in names:
        try:
            saved = xml.parse_snapshot(state.snapshots[name], state.volume_path)
        except VmdkSnapError as error:
            failed.append((name, error))
            continue
        mine = [disk.frozen for disk in saved.disks if disk.mode == "external" and disk.frozen is not None]
        if any(place_in(chain, frozen) is not None for chain in state.served.values() for frozen in mine):
            continue  # its server merges it, and QEMU knows nothing of that
        found += [name] if any(identity_if_known(frozen) in files for frozen in mine) else []
    try:
        if found:
            make_live_plan(state, found)
    except (VmdkSnapError, OSError):
        bad = {name: why for name in found if (why := _obstacle_to(state, name)) is not None}
        return [name for name in found if name not in bad], [*failed, *bad.items()]
    return found, failed


def _obstacle_to(state: State, name: str) -> VmdkSnapError | OSError | None:
    try:
        make_live_plan(state, [name])
    except (VmdkSnapError, OSError) as error:
        return error
    return None


def make_live_plan(state: State, names: Sequence[str]) -> LivePlan:
    """Return what deleting the snapshots in one step does; nothing has changed yet.

    Raises:
        DomainError: a disk of one is not there, or cannot be read.
        StillNeeded: something else needs a file that goes, or may.
        CidMismatch: an overlay does not fit the link below it.
    """
    return _LivePlanner(state, names).plan()


class _LivePlanner:
    def __init__(self, state: State, names: Sequence[str]) -> None:
        self._state, self._names = state, names
        self._planner = Planner(state, names)
        self._chains = chains_of(state)
        self._taken = set(state.named())
        self._dropped: dict[Path, list[Path]] = {}
        """Link -> overlays without data upon it, which go with it."""
        self._groups: list[_Group] = []
        self._told: set[_Group] = set()
        # What the live XML says of these disks is of the guest's start; what QEMU has, the exchange compares itself.
        self._holders = [
            holder
            for holder in [*state.holders(besides=names), *state.needed.of_others(state.uuid)]
            if holder.uuid != state.uuid or holder.snapshot is not None or holder.chain.disk not in self._chains
        ]

    def plan(self) -> LivePlan:
        works: dict[str, list[Work]] = {name: [] for name in self._names}
        doomed: dict[str, dict[int, str]] = {}
        for name in self._names:
            saved = xml.parse_snapshot(self._state.snapshots[name], self._state.volume_path)
            refuse_foreign(self._state.name, saved)
            for disk in saved.disks:
                place = self._place(disk) if disk.mode == "external" else None
                if place is not None:
                    doomed.setdefault(place[0], {})[place[1]] = name
                elif disk.mode == "external":
                    works[name] += self._planner.plan(disk)
        for target, found in doomed.items():
            self._plan_disk(target, found, works)
        merges = [self._merge(group) for group in self._groups if group.first > 0]
        frozen_first = [group for group in self._groups if group.first == 0]
        recorded = [one for work in works.values() for one in work if one.mode != "exchange"]
        return LivePlan(
            intent_of(self._state, self._names, recorded, merges),
            tuple(Deleted(name, tuple(works[name]), memory_of(self._state, self._names, name)) for name in self._names),
            tuple(group.target for group in frozen_first),
        )

    def _place(self, disk: xml.SnapshotDisk) -> tuple[str, int] | None:
        """Return where in which chain of the guest the frozen file goes; None where it is elsewhere, or stays."""
        if disk.frozen is None or self._planner.is_kept(disk.frozen):
            return None
        for target, files in self._chains.items():
            at = place_in(files, disk.frozen)
            if at:
                return target, at
        return None

    def _plan_disk(self, target: str, doomed: dict[int, str], works: dict[str, list[Work]]) -> None:
        files = self._chains[target]
        stays: dict[int, str] = {}
        going: set[int] = set()
        for at in range(1, len(files)):
            if self._planner.is_kept(files[at]):
                continue
            try:
                reason = self._obstacle(target, files, at)
            except (VmdkSnapError, OSError):
                if at in doomed:
                    raise
                continue  # something may need it, and nobody has asked for it to go
            if reason is None:
                going.add(at)
            elif at in doomed:
                stays[at] = reason
        for run in _runs(going):
            asked = not doomed.keys().isdisjoint(run)
            self._groups += [one for one in self._grouped(target, files, run, asked) if one.first < one.last]
        for at, name in sorted(doomed.items()):
            works[name] += self._work(target, files, at, stays.get(at))
        for group in self._groups:  # what earlier deletes have left goes along
            if group.target == target and group not in self._told:
                works[doomed[min(doomed)]] += self._exchanged(group, group.first + 1)

    def _obstacle(self, target: str, files: Sequence[Path], at: int) -> str | None:
        """Return None where the link may go, or why it stays.

        Raises:
            StillNeeded: something else needs it, or may.
        """
        state, planner, path, above = self._state, self._planner, files[at], files[at - 1]
        folders = planner.folders(path)
        others = [child for child in state.children(path, folders) if not same_file(child, above)]
        empty = planner.empty(others, folders)
        others = [child for child in others if child not in empty]
        if others:
            return f"{others[0]} is backed by it too"
        own = files_of([path], folders)

        def settled(holder: Holder, walk: Walk) -> bool:
            below = place_in(walk.files, path)
            return holder.uuid == state.uuid and bool(below) and same_file(walk.files[(below or 0) - 1], above)

        apart = planner.other_disks(target)
        found = [*state.needed.holding(own, self._holders, state.orphans, settled=settled, apart=apart)]
        found += state.needed.around(own, [above, *empty, *state.gone], state.orphans)
        require_none(path, [*found, *planner.other_names(own)])
        self._dropped[path] = empty
        return None

    def _grouped(self, target: str, files: tuple[Path, ...], run: Sequence[int], asked: bool) -> list[_Group]:
        """Return which links of a run, and of the one above it, become one."""
        size_of = self._state.size
        # What the guest writes to is frozen only where nothing else would take what is asked to go.
        start = run[0] - 1 if run[0] > 1 or (asked and len(run) == 1) else run[0]
        free = shares_extents(files[run[0]])
        groups: list[_Group] = []
        size = size_of(files[start])
        for at in range(start + 1, run[-1] + 1):
            more = size_of(files[at])
            if not free and more > max(_CHEAP, _WORTH * size):
                groups.append(_Group(target, files, start, at - 1))
                start, size = at, 0
            size += more
        return [*groups, _Group(target, files, start, run[-1])]

    def _work(self, target: str, files: Sequence[Path], at: int, reason: str | None) -> list[Work]:
        """Return what becomes of a link whose snapshot goes."""
        group = next((one for one in self._groups if one.target == target and one.first <= at <= one.last), None)
        if group is None:
            told = (
                reason
                or "it is far larger than what would be merged with it, and stays in the chain until there is more"
            )
            return [Work(target, "keep", str(files[at]), reason=told)]
        return self._exchanged(group, at)

    def _exchanged(self, group: _Group, at: int) -> list[Work]:
        works = []
        for path in group.links[1:]:
            dropped = self._dropped.pop(path, [])
            works += [Work(group.target, "empty", str(one), parent=str(path)) for one in dropped]
        head, below = str(group.links[0]), None if group.below is None else str(group.below)
        size, links = 0, tuple[str, ...]()
        if group not in self._told:  # once, however many of its links a snapshot has frozen
            size, links = sum(map(self._state.size, group.links)), tuple(map(str, group.links))
            self._told.add(group)
        work = Work(
            group.target, "exchange", str(group.chain[at]), head, parent=below, size=size, live=True, links=links
        )
        freeze = str(next_overlay(group.links[0], self._taken)) if group.first == 0 else None
        return [*works, replace(work, overlay=freeze)]

    def _merge(self, group: _Group) -> Merge:
        folders = self._planner.folders(group.links[0])
        doomed: list[tuple[str, str, int]] = []
        for path in group.links:
            with open_one(path, folders, lock=False) as link:
                files = [file for file in own_files(link) if path != group.links[0] or file != path]
            doomed += [(str(path), str(file), real_file(file).stat().st_ino) for file in files]
        require_none(group.links[0], self._planner.other_names(files_of(group.links[:1], folders)))
        image = next_overlay(group.links[0], self._taken)
        self._taken.add(image)
        return Merge(
            target=group.target,
            upper=str(group.chain[group.first - 1]),
            links=tuple(map(str, group.links)),
            image=str(image),
            below=None if group.below is None else str(group.below),
            size=sum(map(self._state.size, group.links)),
            doomed=tuple(doomed),
        )


def _runs(going: Iterable[int]) -> list[list[int]]:
    """Return the numbers as runs of neighbours, in order."""
    runs: list[list[int]] = []
    for at in sorted(going):
        if runs and runs[-1][-1] == at - 1:
            runs[-1].append(at)
        else:
            runs.append([at])
    return runs


def shares_extents(path: Path) -> bool:
    """Return whether the file system of `path` lets files share their data (reflinks); tried out beside it."""
    try:
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        target = os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        os.close(source)
        return False
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    finally:
        os.close(source)
        os.close(target)
    return True
