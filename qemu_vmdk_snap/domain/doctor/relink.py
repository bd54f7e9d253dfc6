"""A parent whose CID does not fit any more: whether the overlay may be relinked to it without being asked.

It may if nothing can be writing to the parent: an interrupted delete by virsh merged into it. It may not where the
parent is the top of a domain, whose guest has written to it: what the overlay reads is a mixture then.
"""

from __future__ import annotations

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain.doctor.check import Repair
from qemu_vmdk_snap.domain.doctor.view import View
from qemu_vmdk_snap.domain.needs.needed import same_file
from qemu_vmdk_snap.errors import CidMismatch


def relinking(view: View, mismatch: CidMismatch | None) -> tuple[str | None, Repair | None]:
    """Return the remedy for CIDs that do not fit, and what does it where that is safe to do unasked."""
    if mismatch is None:
        return None, None
    overlay, parent = mismatch.overlay, mismatch.parent
    for holder in view.needed.holders:
        files = holder.chain.files
        if holder.snapshot is None and holder.chain.role == "disk" and files and same_file(files[0].path, parent):
            return f"{parent} is a top of {holder.owner}: give that another top first", None
    frozen_by = view.frozen_by(parent)
    changed = f", which was changed: so was what snapshot {frozen_by!r} reads" if frozen_by else ""

    def relink() -> None:
        with engine.allowing(*view.folders, below=False):
            engine.rebase(overlay, parent, unsafe=True)

    line = f"{overlay} is relinked to {parent}{changed}"
    return f"`doctor {view.name} --repair` does it", Repair(line, relink)
