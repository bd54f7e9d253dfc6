"""The served disks of a domain: does each have its server, and does that write to what the XML names?"""

from __future__ import annotations

from collections.abc import Iterator

from qemu_vmdk_snap.domain.doctor.check import Check, Repair
from qemu_vmdk_snap.domain.doctor.view import View
from qemu_vmdk_snap.domain.hooks import install as hooks
from qemu_vmdk_snap.domain.served.commands import served_status
from qemu_vmdk_snap.domain.served.guest import ready


def check_served(view: View) -> Iterator[Check]:
    """Yield what there is to say of the servers; one that a running guest has lost can be started again."""
    found = served_status(view.conn, view.name)
    for one in found:
        subject = f"served {one.target}"
        if one.problem is None:
            yield Check(subject, "good", f"by a server at {one.socket}: {one.state}")
        elif one.server is None:
            remedy = f"`serve start {view.name}`, or `doctor {view.name} --repair`, starts it and resumes the guest"
            done = Repair(f"disk {one.target}: is served again", lambda: ready(view.conn, view.domain))
            yield Check(subject, "bad", one.problem, remedy, done)
        else:
            yield Check(subject, "bad", one.problem)
    if found and not hooks.status().installed:
        reason = "the hook is not installed, so nothing starts the servers before the guest"
        yield Check("served disks", "note", reason, f"`hook install`, or `serve start {view.name}` before each start")
