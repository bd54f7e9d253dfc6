"""The changes that make the parentCID of every link of a chain the CID of its parent."""

from __future__ import annotations

import contextlib
from pathlib import Path

from qemu_vmdk_snap.chain.identity import fitting_parent
from qemu_vmdk_snap.chain.parent import Descent, find_parent
from qemu_vmdk_snap.chain.resolver import Resolver, check_opened
from qemu_vmdk_snap.errors import Unsupported
from qemu_vmdk_snap.ops.check.opening import descriptor_of, open_file_for_change
from qemu_vmdk_snap.ops.check.repair_plan import ExtentPlan
from qemu_vmdk_snap.storage.blockfile import BlockFile, FileOpener
from qemu_vmdk_snap.units import SECTOR_SIZE, sector_bytes
from qemu_vmdk_snap.vmdk.descriptor import Descriptor
from qemu_vmdk_snap.vmdk.sparse.header import SparseExtentHeader


def plan_relinks(
    plans: list[ExtentPlan], resolver: Resolver, opener: FileOpener, stack: contextlib.ExitStack
) -> tuple[Path, ...]:
    """Add to `plans`, the first of which is the top's, what each link needs; return the links that change, top first.

    Every link is open and locked until `stack` closes: for writing where it changes.

    Raises:
        CorruptChain: a parent is missing or may not be opened.
        FormatError, Unsupported: a descriptor cannot be read, or has no room for a longer parentCID.
        LockBusy: another process has a link open.
    """
    changed: list[Path] = []
    link, plan = plans[0].file, plans[0]
    descent = Descent()
    descent.step(link.path)
    while (parent := _parent_of(link, resolver)) is not None:
        if descent.obstacle(parent) is not None:
            break  # the check has found it
        below, fits = _opened(link, parent, resolver, opener)
        stack.callback(below.close)
        theirs, mine = descriptor_of(below), descriptor_of(link)
        if mine.parent_cid != theirs.cid:
            _add_relink(plan, link, mine, theirs)
            changed.append(link.path)
        link, plan = below, ExtentPlan(below, end=below.size())
        if not fits:
            plans.append(plan)
    return tuple(changed)


def _parent_of(link: BlockFile, resolver: Resolver) -> Path | None:
    return find_parent(descriptor_of(link), resolver)


def _opened(child: BlockFile, path: Path, resolver: Resolver, opener: FileOpener) -> tuple[BlockFile, bool]:
    """Return a parent, open, and whether its own parentCID fits: what does not change is opened for reading."""
    file = open_file_for_change(path, opener, writable=False)
    try:
        check_opened(resolver, child.path, file, "parent")
        fits = _fits(file, resolver, opener)
    except BaseException:
        file.close()
        raise
    if fits:
        return file, True
    file.close()
    file = open_file_for_change(path, opener)
    try:
        check_opened(resolver, child.path, file, "parent")
    except BaseException:
        file.close()
        raise
    return file, False


def _fits(link: BlockFile, resolver: Resolver, opener: FileOpener) -> bool:
    parent = _parent_of(link, resolver)
    if parent is None:
        return True
    below = opener(parent, False)
    try:
        check_opened(resolver, link.path, below, "parent")
        return descriptor_of(below).cid == descriptor_of(link).parent_cid
    finally:
        below.close()


def _add_relink(plan: ExtentPlan, link: BlockFile, mine: Descriptor, theirs: Descriptor) -> None:
    changed = fitting_parent(mine, theirs).raw
    if mine.base:
        header = SparseExtentHeader.parse(link.read_at(0, SECTOR_SIZE), path=link.path)
        room = sector_bytes(header.descriptor_size)
        if len(changed) > room:
            raise Unsupported(link.path, f"a descriptor of {len(changed)} bytes does not fit into its {room} bytes")
        changed += bytes(max(0, len(mine.raw) - len(changed)))
    else:
        plan.end = len(changed)
    plan.patches.append((mine.base, changed))
