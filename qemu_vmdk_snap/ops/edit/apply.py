"""Merge a delta into a copy of its base: the copy then equals the top of the delta, CID included."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from qemu_vmdk_snap.chain.chain import Chain, open_links
from qemu_vmdk_snap.chain.change import open_for_change
from qemu_vmdk_snap.chain.identity import with_cid, with_fresh_cid
from qemu_vmdk_snap.chain.link import Link, open_link
from qemu_vmdk_snap.chain.needs.dependents import (
    Census,
    require_nobody_new,
    require_one_name,
    require_unneeded,
    search_folders,
)
from qemu_vmdk_snap.chain.needs.own import require_own_files
from qemu_vmdk_snap.chain.resolver import Resolver, confined
from qemu_vmdk_snap.errors import CidMismatch, InvalidRequest
from qemu_vmdk_snap.light import dataclass
from qemu_vmdk_snap.ops.copy.transfer import LinkWriter, View, upper_tables
from qemu_vmdk_snap.ops.edit.trim import trim_link
from qemu_vmdk_snap.ops.journal.guard import folders_of, guarded_operation
from qemu_vmdk_snap.ops.journal.recover import settle
from qemu_vmdk_snap.ops.journal.relink import DescriptorChange
from qemu_vmdk_snap.ops.progress import Meter, OnProgress, ignore
from qemu_vmdk_snap.storage.blockfile import FileOpener, open_posix
from qemu_vmdk_snap.storage.record import Operation

OPERATION: Final = "apply"


@dataclass(frozen=True, slots=True)
class ApplyReport:
    """What an apply did."""

    path: Path
    delta: Path
    cid: int
    """The new CID of the image: that of the delta."""

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types, as `image apply --output=json` shows it."""
        return {"filename": str(self.path), "delta": str(self.delta), "cid": self.cid}


def apply_delta(
    delta: Path | str,
    path: Path | str,
    *,
    force: bool = False,
    orphans: Sequence[Path | str] = (),
    trusted_dirs: Sequence[Path | str] = (),
    resolver: Resolver | None = None,
    opener: FileOpener = open_posix,
    on_progress: OnProgress = ignore,
) -> ApplyReport:
    """Merge `delta` into the image `path`, which must have the CID that the delta names as its parent's.

    `force` merges it into an image with any other CID: for a copy that was made without keeping the CID. If it is
    interrupted, also by a callback that raises, the image is partly changed, has a CID of its own, and is refused to
    every writer until `recover` has finished the work: the delta must be kept until then. `orphans` are files that need
    the image and are given up.

    Raises:
        CidMismatch: the image is not the base of the delta, and `force` is not given.
        InvalidRequest: its size differs from that of the delta's disk, or it has an extent that is not its own.
        StillNeeded: something else needs the image, or may need it.
        Unsupported: the kind of the image does not allow writing.
        LockBusy: another process has one of the two open.
    """
    delta, path = Path(delta), Path(path)
    path = path.resolve() if path.is_symlink() else path
    find = resolver or confined(trusted_dirs)
    settle(path.parent, opener=opener, resolver=find)
    with contextlib.ExitStack() as stack:
        chain = stack.enter_context(open_for_change(path, depths=[0], resolver=find, opener=opener))
        source = open_link(delta, opener=opener, writable=False, resolver=find)
        stack.callback(source.close)
        _check(chain, source, force)
        require_own_files(chain.links[0])
        census = _require_unneeded(chain.links[0], source, [Path(one) for one in orphans], find)
        target = chain.links[0]
        begin, finish = _cids(target, source)
        details = {"begin": begin.as_detail(), "finish": finish.as_detail(), "delta": source.path.resolve()}
        details["links"] = [link.path for link in chain.links]
        record = guarded_operation(OPERATION, path, [], details)
        with record.hold:
            record.begin_if(lambda: require_nobody_new(path, [file.path for file in target.files], census))
            begin.apply(target)
            _merge(chain, source, on_progress)
            finish.apply(target)
            record.end()
        return ApplyReport(path, delta, target.cid)


def finish_apply(record: Operation, opener: FileOpener) -> None:
    """Finish an apply that another process began."""
    details = record.details
    delta: Path = details["delta"]
    resolver = confined(folders_of(record))
    finish = DescriptorChange.from_detail(details["finish"])
    DescriptorChange.from_detail(details["begin"]).redo(opener)
    with open_links(record.image, writable_depths=[0], resolver=resolver, opener=opener) as chain:
        source = open_link(delta, opener=opener, writable=False, resolver=resolver)
        try:
            trim_link(chain.links[0])
            _merge(chain, source, ignore)
            finish.apply(chain.links[0])
        finally:
            source.close()


def _check(chain: Chain, source: Link, force: bool) -> None:
    target = chain.links[0]
    if source.parent_cid != target.cid and not force:
        raise CidMismatch(source.path, target.path, source.parent_cid, target.cid)
    if source.capacity != target.capacity:
        reason = f"is {target.capacity} bytes large, the disk of {source.path} {source.capacity}"
        raise InvalidRequest(target.path, reason)


def _require_unneeded(target: Link, source: Link, orphans: list[Path], resolver: Resolver) -> Census:
    files = [file.path for file in target.files]
    census = Census.of(search_folders(files, resolver))
    require_unneeded(target.path, files, census, handled=[source.path], orphans=orphans)
    require_one_name(target.path, files, census, orphans=orphans)
    return census


def _cids(target: Link, source: Link) -> tuple[DescriptorChange, DescriptorChange]:
    """Return the change to a new CID that fits nothing, and the one from there to the delta's."""
    begin = DescriptorChange.plan(target, with_fresh_cid(target.descriptor))
    finish = DescriptorChange.plan(target, with_cid(target.descriptor, source.cid))
    return begin, DescriptorChange(finish.path, finish.base, begin.new, finish.new)


def _merge(chain: Chain, source: Link, on_progress: OnProgress) -> None:
    total = chain.capacity
    meter = Meter(OPERATION, total, on_progress)
    writer = LinkWriter(chain.links[0], View(chain, 1), meter.step)
    alone = Chain([source])
    for table in upper_tables(alone, 1, 0, total):
        writer.put_rows(table.rows(), alone)
        meter.reach(table.end)
    writer.finish()
