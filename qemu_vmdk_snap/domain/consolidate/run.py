"""Merge the leftover links of a domain: each as the delete of a snapshot that had frozen it.

The plan, the questions and the steps are those of a delete; only the snapshot is made up, and never registered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qemu_vmdk_snap import OnProgress, ignore, log
from qemu_vmdk_snap.domain.connect import find_domain
from qemu_vmdk_snap.domain.consolidate.find import Leftover, find_leftovers
from qemu_vmdk_snap.domain.delete.plan import State, folders_of, make_intent
from qemu_vmdk_snap.domain.delete.preflight import check_work
from qemu_vmdk_snap.domain.delete.run import finish
from qemu_vmdk_snap.domain.delete.work import work_of
from qemu_vmdk_snap.domain.dry_run import planning
from qemu_vmdk_snap.domain.journal.record import Intent, IntentStore
from qemu_vmdk_snap.domain.journal.recover import Recovery, recover_domain
from qemu_vmdk_snap.domain.needs.needed import Given, place_in
from qemu_vmdk_snap.domain.needs.orphans import find_orphans
from qemu_vmdk_snap.domain.overlay.newfile import refresh_pools
from qemu_vmdk_snap.domain.state import check_state, inactive_xml
from qemu_vmdk_snap.domain.xml.kept import kept_branches
from qemu_vmdk_snap.errors import DomainError, VmdkSnapError

if TYPE_CHECKING:
    import libvirt

_log = log.of(__name__)
_MADE_UP: Final = "/leftover"
"""A name that no snapshot can have."""


@dataclass(frozen=True, slots=True)
class Merged:
    """A leftover link that is gone, or would be."""

    target: str
    path: Path
    operations: tuple[str, ...]
    """What happens to the files, one line each."""

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types."""
        return {"target": self.target, "filename": str(self.path), "operations": list(self.operations)}


@dataclass(frozen=True, slots=True)
class ConsolidateReport:
    """What a consolidation did."""

    domain: str
    merged: tuple[Merged, ...]
    kept: tuple[tuple[Path, str], ...]
    """Leftover links that stay, and why."""
    orphans: tuple[Path, ...]
    """Overlays on files of the domain that are in no chain of it: they are only reported."""
    recovered: Recovery | None
    notes: tuple[str, ...] = ()
    dry_run: bool = False
    """Whether this is only what would be done."""

    @property
    def changed(self) -> bool:
        """Whether anything was changed."""
        return bool(self.merged) and not self.dry_run

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types, as `snapshot consolidate --output=json` shows it."""
        return {
            "domain": self.domain,
            "merged": [one.as_dict() for one in self.merged],
            "kept": [{"filename": str(path), "reason": reason} for path, reason in self.kept],
            "orphans": [str(path) for path in self.orphans],
            "notes": list(self.notes),
        } | ({"dry-run": True} if self.dry_run else {})


def consolidate(
    conn: libvirt.virConnect,
    domain_name: str,
    *,
    include: Sequence[Path] = (),
    orphans: Sequence[Path] = (),
    dry_run: bool = False,
    on_progress: OnProgress = ignore,
) -> ConsolidateReport:
    """Merge the links of the domain's chains that no snapshot has; the domain and its snapshots read what they read.

    A link whose overlay is not called after it may be a template, and is merged only where `include` names it.
    `orphans` are files that need what changes and are given up. One that cannot be merged stays, and the report says
    why.

    Raises:
        DomainError: the domain runs; or a merge that has begun cannot be finished now, and is left to `recover`.
        VmdkSnapError, OSError: a chain cannot be opened.
    """
    if dry_run:
        with planning(conn, domain_name) as (domain, _):
            return _plan(conn, domain, include, orphans)
    domain = find_domain(conn, domain_name)
    store = IntentStore.of(conn)
    merged: list[Merged] = []
    with store.locked(domain.UUIDString(), domain.name()):
        recovered = recover_domain(conn, domain, store)
        kept: dict[Path, str] = {}
        while True:
            _require_off(domain)
            state = State.read(conn, domain, orphans)
            found = next((one for one in find_leftovers(state, [*kept]) if _may_go(one, include, kept)), None)
            if found is None:
                break
            try:
                intent = _intent(state, found)
            except (VmdkSnapError, OSError) as error:
                kept[found.path] = str(error)
                continue
            _execute(conn, domain, store, replace(intent, snapshot="", operation="consolidate"), on_progress)
            merged.append(_merged(found, intent))
        left = _orphans(conn, domain)
    refresh_pools(conn, [one.path for one in merged])
    return ConsolidateReport(domain.name(), tuple(merged), tuple(kept.items()), left, recovered)


def _plan(
    conn: libvirt.virConnect, domain: libvirt.virDomain, include: Sequence[Path], orphans: Sequence[Path]
) -> ConsolidateReport:
    _require_off(domain)
    state = State.read(conn, domain, orphans)
    merged: list[Merged] = []
    kept: dict[Path, str] = {}
    for one in [*find_leftovers(state)]:
        if not _may_go(one, include, kept):
            continue
        try:
            intent = _intent(state, one, check=not merged)  # the others can be checked only after this one is deleted
        except (VmdkSnapError, OSError) as error:
            kept[one.path] = str(error)
            continue
        merged.append(_merged(one, intent))
        state = replace(state, snapshots={**state.snapshots, _MADE_UP: intent.snapshot_xml}).after(intent)
    left = _orphans(conn, domain)
    return ConsolidateReport(domain.name(), tuple(merged), tuple(kept.items()), left, None, dry_run=True)


def _require_off(domain: libvirt.virDomain) -> None:
    check_state(domain)
    if domain.isActive():
        raise DomainError(domain.name(), "runs: shut it off first")


def _may_go(one: Leftover, include: Sequence[Path], kept: dict[Path, str]) -> bool:
    if one.path in kept:
        return False
    if one.is_numbered or place_in(include, one.path) is not None:
        return True
    kept[one.path] = (
        f"the name of {one.child.name} is not that of an overlay on it: it may be a template (--include merges it)"
    )
    return False


def _intent(state: State, one: Leftover, *, check: bool = True) -> Intent:
    made_up = replace(state, snapshots={**state.snapshots, _MADE_UP: one.as_snapshot(_MADE_UP)})
    intent = make_intent(made_up, _MADE_UP, metadata=False)
    if check:
        check_work(state.name, work_of(intent), folders_of(intent))
    return intent


def _execute(
    conn: libvirt.virConnect, domain: libvirt.virDomain, store: IntentStore, intent: Intent, on_progress: OnProgress
) -> None:
    for work in work_of(intent):
        _log.info("domain %s: %s: %s", domain.name(), work.target, "; ".join(work.lines()))
    store.write(intent)  # barrier: from here on `finish` knows what to do
    try:
        finish(conn, domain, intent, on_progress=on_progress)
    except (VmdkSnapError, OSError) as error:
        raise DomainError(domain.name(), f"{error}; the merge is not finished: `recover` resumes it") from error
    with contextlib.suppress(OSError):
        store.remove(intent.uuid)


def _merged(one: Leftover, intent: Intent) -> Merged:
    return Merged(one.target, one.path, tuple(line for work in work_of(intent) for line in work.lines()))


def _orphans(conn: libvirt.virConnect, domain: libvirt.virDomain) -> tuple[Path, ...]:
    kept = Given(tuple(kept_branches(inactive_xml(domain))))
    return tuple(orphan.path for orphan in find_orphans(conn, domain) if not kept.has(orphan.path))
