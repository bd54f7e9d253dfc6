"""Merge a link, and those between, into a link below it; everything above reads the same as before.

    before:  C -> T -> M -> B <- S          commit(T, base=B, delete=True), S kept by copying
    after:   C -> B' <- S'                  B' reads what T read, S' what S read

Order, so that T, and everything above it, reads the same whenever this is interrupted:
1. What others read from B and would lose is copied into them (`keep_siblings`), durably; they read the same.
2. The operation record is durable. B gets a new CID, and its children in the operation the matching parentCID.
3. T's data is copied to B: T hides every byte that changes. Data is durable before the tables that name it.
4. The record says that the copy is done. The children of T move to B, one descriptor each; T is emptied or deleted.
A torn descriptor is written again from the record.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from qemu_vmdk_snap import log
from qemu_vmdk_snap.chain.chain import Chain, open_chain, open_links
from qemu_vmdk_snap.chain.change import open_for_change, open_link_for_change
from qemu_vmdk_snap.chain.identity import fitting_parent, on_parent, with_fresh_cid
from qemu_vmdk_snap.chain.link import Link, open_link
from qemu_vmdk_snap.chain.links import read_facts
from qemu_vmdk_snap.chain.needs.dependents import (
    Census,
    children_of,
    require_fit,
    require_nobody_new,
    require_one_name,
    require_unneeded,
    require_unshared,
    search_folders,
)
from qemu_vmdk_snap.chain.needs.own import own_files, require_own_files
from qemu_vmdk_snap.chain.resolver import Resolver, confined, unconfined
from qemu_vmdk_snap.errors import CorruptChain, InvalidRequest, StillNeeded, Unsupported
from qemu_vmdk_snap.light import dataclass, field
from qemu_vmdk_snap.ops.copy.limited import paced
from qemu_vmdk_snap.ops.copy.transfer import Clearable, LinkWriter, View, restricted, upper_tables
from qemu_vmdk_snap.ops.edit.move import delete_files, holding
from qemu_vmdk_snap.ops.edit.trim import trim_link
from qemu_vmdk_snap.ops.journal.guard import folders_of, guarded_operation
from qemu_vmdk_snap.ops.journal.recover import settle
from qemu_vmdk_snap.ops.journal.relink import DescriptorChange, changing_child_of
from qemu_vmdk_snap.ops.progress import Meter, OnProgress, ignore
from qemu_vmdk_snap.storage.blockfile import FileOpener, open_posix
from qemu_vmdk_snap.storage.record import Operation
from qemu_vmdk_snap.vmdk.runs import HOLE, ZERO

_log = log.of(__name__)

OPERATION = "commit"


@dataclass(frozen=True, slots=True)
class CommitReport:
    """What a commit did."""

    path: Path
    base: Path
    relinked: tuple[Path, ...]
    """Images whose parent is now `base`."""
    deleted: tuple[Path, ...]
    """Images that are gone."""

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types, as `image commit --output=json` shows it."""
        return {
            "filename": str(self.path),
            "base": str(self.base),
            "relinked": [str(path) for path in self.relinked],
            "deleted": [str(path) for path in self.deleted],
        }


@dataclass(slots=True)
class _Plan:
    chain: Chain
    depth: int
    delete: bool
    siblings: list[Link]
    """Other children of the base, which must read the same afterwards."""
    children: list[Link]
    """Children of the top, which move to the base when the top goes."""
    doomed: list[Path]
    """Files that are deleted in the end."""
    begin: list[DescriptorChange] = field(default_factory=list)
    finish: list[DescriptorChange] = field(default_factory=list)

    @property
    def base(self) -> Link:
        return self.chain.links[self.depth]

    @property
    def top(self) -> Link:
        return self.chain.links[0]


def commit(
    path: Path | str,
    *,
    base: Path | str | None = None,
    delete: bool = False,
    keep_siblings: bool = False,
    children: Sequence[Path | str] = (),
    orphans: Sequence[Path | str] = (),
    trusted_dirs: Sequence[Path | str] = (),
    resolver: Resolver | None = None,
    opener: FileOpener = open_posix,
    rate_limit: int = 0,
    on_progress: OnProgress = ignore,
) -> CommitReport:
    """Merge the image `path`, and every link between, into `base` (by default its parent).

    The image is emptied and stays an overlay on `base` that reads the same; so do links between. With `delete` it and
    the links between are deleted, and its children become children of `base`. Children are those in `children`, and
    those in the folders of the chain and in those that `resolver` allows. Other children of a link that changes would
    read other data: that is refused, or, with `keep_siblings`, what they would lose is first copied into them.
    `orphans` are files that need a link that changes and are given up: they are not changed, and become invalid. At
    most `rate_limit` bytes a second are stored; 0 is no limit.

    If a callback cancels it, everything above the base reads the same; the base is partly merged, under a new CID.

    Raises:
        InvalidRequest: there is no parent, `base` is not below `path`, is too small, or has an extent that is not its
            own.
        StillNeeded: something else needs a link that changes or is deleted, or may need it.
        Unsupported: the kind of the base does not allow writing, or that of the image does not allow emptying it.
        LockBusy: another process has one of the images open.
        CidMismatch, CorruptChain, FormatError, OSError: the chain cannot be opened.
    """
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path
    find = resolver or confined(trusted_dirs)
    settle(path.parent, opener=opener, resolver=find)
    depth = _depth_of(path, base, find, opener)
    with contextlib.ExitStack() as stack:
        chain = stack.enter_context(open_for_change(path, depths=range(depth + 1), resolver=find, opener=opener))
        _check_still(chain, depth, base)
        needs = _Needs.of(chain, depth, [Path(child) for child in children], [Path(one) for one in orphans], find)
        plan = _make_plan(chain, depth, delete, needs, find, opener, stack)
        others = _others(plan)
        if others and not keep_siblings:
            reason = "would no longer read the same (--keep-siblings copies into it what it would lose)"
            raise StillNeeded(plan.base.path, tuple((link.path, reason) for link in others))
        _log.info("%s: %d links are merged into %s", path, depth, plan.base.path)
        for sibling in plan.siblings:
            try:
                _keep(plan, sibling, Meter("keep", chain.capacity, on_progress))
            except BaseException:
                trim_link(sibling)  # it reads the same: what was copied in vain is removed
                raise
        return _run(plan, needs, rate_limit, on_progress)


class _Needs(NamedTuple):
    """Who needs the links of a chain: looked up once, in every folder in question."""

    chain: Chain
    census: Census
    named: list[Path]
    orphans: list[Path]

    @classmethod
    def of(cls, chain: Chain, depth: int, children: list[Path], orphans: list[Path], resolver: Resolver) -> _Needs:
        paths = [file.path for link in chain.links[: depth + 1] for file in link.files]
        known = [*children, *(link.path for link in chain.links)]
        return cls(chain, Census.of(search_folders([*paths, *children], resolver)), known, orphans)

    def children(self, number: int) -> list[Path]:
        """Return the overlays on the link that can be moved; raises StillNeeded for anything else that needs it."""
        link = self.chain.links[number]
        found = children_of(link.path, self._files(link), self.census, named=self.named, orphans=self.orphans)
        require_fit(link.path, link.cid, found)
        return [one.path for one in found]

    def others(self, number: int) -> list[Path]:
        """Return the overlays on the link except the next one of the chain."""
        above = self.chain.links[number - 1].path.resolve()
        return [path for path in self.children(number) if path.resolve() != above]

    def require_none(self, number: int) -> None:
        """Refuse the deletion of a link between the top and the base that something else needs."""
        link, above = self.chain.links[number], self.chain.links[number - 1]
        require_unneeded(link.path, self._files(link), self.census, handled=[above.path], orphans=self.orphans)

    def require_nobody_new(self, depth: int) -> None:
        """Refuse if something new needs one of the links."""
        files = [file for link in self.chain.links[: depth + 1] for file in self._files(link)]
        require_nobody_new(self.chain.links[depth].path, files, self.census)

    def require_no_other_name(self, depth: int) -> None:
        """Refuse to delete links whose files have other names: what is below them is deleted as well."""
        for link in self.chain.links[: depth - 1]:
            require_one_name(link.path, self._files(link), self.census, orphans=self.orphans)

    def require_only_children(self, number: int) -> None:
        """Refuse to empty a link whose extents another image uses too; overlays on it read the same afterwards."""
        link = self.chain.links[number]
        require_unshared(link.path, self._files(link), self.census, orphans=self.orphans)

    def require_one_name(self, depth: int) -> None:
        """Refuse to write to files of the base that have other names: their users would see it."""
        base = self.chain.links[depth]
        require_one_name(base.path, self._files(base), self.census, orphans=self.orphans)

    @staticmethod
    def _files(link: Link) -> list[Path]:
        return [file.path for file in link.files]


def _home(child: Path, parent: Link) -> Path:
    """Return the path by which a child is opened: the target of a symbolic link, if its hint is valid from there."""
    if child.is_symlink():
        real = child.resolve()
        with contextlib.suppress(CorruptChain, OSError):
            if unconfined(real, read_facts(real).hint or "", "parent").samefile(parent.path):
                return real
    return child


def _others(plan: _Plan) -> list[Link]:
    """Return the siblings that are not links of the chain itself."""
    return [link for link in plan.siblings if link not in plan.chain.links]


def _depth_of(path: Path, base: Path | str | None, resolver: Resolver, opener: FileOpener) -> int:
    """Return how far below `path` the base is; how many links to lock must be known before they are locked."""
    with open_chain(path, resolver=resolver, opener=opener, lock=False) as chain:
        if chain.depth == 1:
            raise InvalidRequest(path, "has no parent to commit to")
        depth = _place_of(chain, base)
    if depth is None:
        raise InvalidRequest(path, f"{base} is not below it in its backing chain")
    return depth


def _place_of(chain: Chain, base: Path | str | None) -> int | None:
    if base is None:
        return 1 if chain.depth > 1 else None
    real = Path(base).resolve()
    return next((depth for depth, link in enumerate(chain.links) if depth and link.path.resolve() == real), None)


def _check_still(chain: Chain, depth: int, base: Path | str | None) -> None:
    """Refuse a chain that another process has changed between the look at it and its locks."""
    if _place_of(chain, base) != depth:
        raise InvalidRequest(chain.path, "its backing chain was changed by another process just now: try again")


def _make_plan(
    chain: Chain,
    depth: int,
    delete: bool,
    needs: _Needs,
    resolver: Resolver,
    opener: FileOpener,
    stack: contextlib.ExitStack,
) -> _Plan:
    plan = _Plan(chain, depth, delete, [], [], [])
    top, base = plan.top, plan.base
    if top.capacity > base.capacity:
        reason = f"its {base.capacity} bytes cannot take the {top.capacity} of {top.path}: resize it first"
        raise InvalidRequest(base.path, reason)
    _check_takes(chain, depth)
    require_own_files(base)
    if not delete:
        _check_clearable(top)
        needs.require_only_children(0)
    needs.require_one_name(depth)

    def opened(paths: Iterable[Path], parent: Link) -> list[Link]:
        with changing_child_of(parent.path):
            return [
                open_link_for_change(_home(path, parent), resolver=resolver, opener=opener, stack=stack, owner=None)
                for path in paths
            ]

    plan.siblings = opened(needs.others(depth), base)
    if delete:
        needs.require_no_other_name(depth)
    for number in range(1, depth) if delete else ():
        needs.require_none(number)
    if depth > 1 and not delete:
        plan.siblings.append(chain.links[depth - 1])  # stays, with everything above it, and must read the same
    if delete:
        plan.children = opened(needs.children(0), top)
        longer = [link.path for link in plan.children if link.capacity > top.capacity < base.capacity]
        if longer:
            reason = f"cannot be deleted: {longer[0]} reads zeros past its end, and would read {base.path} there"
            raise InvalidRequest(top.path, reason)
        plan.doomed = [path for link in chain.links[:depth] for path in own_files(link)]
    _plan_descriptors(plan)
    return plan


def _check_takes(chain: Chain, depth: int) -> None:
    """Refuse, before anything is written, data for places where the base may not be written or has no storage."""
    base, capacity = chain.links[depth], chain.links[0].capacity
    for line, placed in zip(base.descriptor.extents, base.extents, strict=True):
        if (line.access == "RW" and placed.extent.file is not None) or placed.start >= capacity:
            continue
        harmless = ZERO if placed.extent.file is None else HOLE
        length = min(placed.extent.capacity, capacity - placed.start)
        for table in upper_tables(chain, depth, placed.start, length):
            stored = table.starts[table.kinds > harmless]
            if len(stored):
                feature = f"its extent {line.access} {line.type} cannot take what {chain.path} has at byte {stored[0]}"
                raise Unsupported(base.path, f"byte {line.at:#x}: {feature}")


def _check_clearable(link: Link) -> None:
    for placed in link.extents:
        if not isinstance(placed.extent, Clearable):
            raise Unsupported(link.path, "an image of this kind cannot be emptied: delete it (-d)")


def _plan_descriptors(plan: _Plan) -> None:
    base = plan.base
    fresh = with_fresh_cid(base.descriptor)
    plan.begin = [DescriptorChange.plan(base, fresh)]
    above = plan.chain.links[plan.depth - 1]
    for link in [above, *_others(plan)]:
        plan.begin.append(DescriptorChange.plan(link, fitting_parent(link.descriptor, fresh)))
    moving = plan.children if plan.delete else [plan.top] if plan.depth > 1 else []
    for link in moving:
        changed = on_parent(link.descriptor, link.path, base.path, fresh)
        plan.finish.append(DescriptorChange.plan(link, changed))


def _keep(plan: _Plan, sibling: Link, meter: Meter) -> None:
    """Copy into a sibling what it reads from the base where the base is about to change."""
    chain, depth = plan.chain, plan.depth
    upper = depth - 1 if sibling in chain.links else depth
    seen = View(chain, depth)
    capacity = min(sibling.capacity, plan.top.capacity)
    writer = LinkWriter(sibling, seen, meter.step, later=View(chain, 0))
    for table in upper_tables(chain, upper, 0, capacity):
        start = int(table.starts[0])
        held = chain.resolve(start, table.end, depth)
        writer.put_rows(restricted(held, (table, False), (sibling.resolve(start, table.end), True)), seen)
        meter.reach(table.end)
    writer.finish()


def _run(plan: _Plan, needs: _Needs, rate_limit: int, on_progress: OnProgress) -> CommitReport:
    chain, top, base = plan.chain, plan.top, plan.base
    details = {
        "stage": "copy",
        "depth": plan.depth,
        "begin": [change.as_detail() for change in plan.begin],
        "finish": [change.as_detail() for change in plan.finish],
        "clear": not plan.delete,
        "delete": plan.doomed,
        "links": [link.path for link in chain.links],
    }
    written = [change.path for change in [*plan.begin, *plan.finish]]
    images = [*(link.path for link in chain.links[: plan.depth + 1]), *written, *plan.doomed]
    record = guarded_operation(OPERATION, top.path, images, details)
    links = {
        link.path.parent.resolve() / link.path.name: link for link in [*chain.links, *plan.siblings, *plan.children]
    }
    with record.hold:
        record.begin_if(lambda: needs.require_nobody_new(plan.depth))
        for change in plan.begin:
            change.apply(links[change.path])
        try:
            _copy(chain, plan.depth, rate_limit, on_progress)
        except BaseException:
            trim_link(base)  # everything above reads the same, and the CIDs fit: nothing is left to finish
            record.end()
            raise
        record = record.update(stage="finish")
        for change in plan.finish:
            change.apply(links[change.path])
        if not plan.delete:
            _clear(top)
        delete_files(plan.doomed)
        record.end()
    deleted = tuple(link.path for link in chain.links[: plan.depth]) if plan.delete else ()
    return CommitReport(top.path, base.path, tuple(change.path for change in plan.finish), deleted)


def _copy(chain: Chain, depth: int, rate_limit: int, on_progress: OnProgress) -> None:
    base, total = chain.links[depth], chain.capacity
    meter = Meter("commit", total, on_progress)
    writer = LinkWriter(base, View(chain, depth + 1), paced(meter.step, rate_limit))
    for table in upper_tables(chain, depth, 0, total):
        writer.put_rows(table.rows(), chain)
        meter.reach(table.end)
    writer.finish()


def _clear(link: Link) -> None:
    for placed in link.extents:
        if isinstance(placed.extent, Clearable):
            placed.extent.clear()


def finish_commit(record: Operation, opener: FileOpener) -> None:
    """Finish a commit that another process began."""
    details = record.details
    depth = int(details["depth"])
    resolver = confined(folders_of(record))
    if details["stage"] == "copy":
        for change in _changes(details["begin"]):
            change.redo(opener)
        depths = range(depth + 1)
        with open_links(record.image, writable_depths=depths, resolver=resolver, opener=opener) as chain:
            trim_link(chain.links[depth])
            _copy(chain, depth, 0, ignore)
        record = record.update(stage="finish")
    with holding(details["delete"], opener):
        for change in _changes(details["finish"]):
            change.redo(opener)
        if details["clear"]:
            link = open_link(record.image, opener=opener, writable=True, resolver=resolver)
            try:
                _clear(link)
            finally:
                link.close()
        delete_files(details["delete"])


def _changes(details: Iterable[dict[str, object]]) -> Iterator[DescriptorChange]:
    return map(DescriptorChange.from_detail, details)
