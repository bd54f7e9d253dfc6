"""What `demo --served` does: the same disk served by a server of ours, snapshots of a running guest, and its memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from qemu_vmdk_snap.cli.demo.scenario import DOMAIN, Demo, Point
from qemu_vmdk_snap.domain.attach.run import attach, detach
from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.delete.run import delete
from qemu_vmdk_snap.domain.registry import list_snapshots
from qemu_vmdk_snap.domain.revert.run import revert
from qemu_vmdk_snap.domain.served.commands import start_servers, stop_servers
from qemu_vmdk_snap.domain.state import inactive_xml
from qemu_vmdk_snap.domain.xml import list_disks
from qemu_vmdk_snap.harness import attach as attach_probe
from qemu_vmdk_snap.harness import pattern
from qemu_vmdk_snap.units import KIB

if TYPE_CHECKING:
    from pathlib import Path

    from qemu_vmdk_snap.harness import ProbeSession

_MISTAKE_SEED: Final = 0xBAD


class ServedDemo(Demo):
    """The second half: nothing is booted anew between a snapshot with memory and the return to it."""

    def run(self) -> bool:
        """Run the demo and return whether every guest saw what was expected everywhere.

        Raises:
            GuestError, PluginError, DomainError, OSError: something needed is missing or failed.
        """
        self._make_base()
        self._define()
        attached = attach(self._conn, DOMAIN, [])
        self.say(f"serve attach: {self.base.name} is served on {attached.disks[0].socket.name}, QEMU sees a raw disk")
        with self._running() as probe:
            self._compare("domain", self._top().name, probe)
            self._guest_writes(probe)
            self._freeze("while-running")
            memory = self.folder / "with-memory.memory"
            self._freeze("with-memory", memory)
            then = {region.name: bytes(region.content) for region in self.regions}
            self._make_a_mistake(probe)
            self._compare("domain", self._top().name, probe)
            probe.close()
            resumed = self._go_back(then)
            self._delete("while-running")
            self._compare("domain", self._top().name, resumed)
            resumed.power_off()
            self._wait_until_off()
            resumed.close()
        detach(self._conn, DOMAIN, [])
        self.say("serve detach: QEMU's own vmdk driver opens the files again")
        self.points.append(Point("now", self._top(), self._expected()))
        for point in self.points:
            self._boot_read_only(point)
        self.snapshots = list_snapshots(self._conn, DOMAIN)
        self._note_chain()
        return all(row.same for row in self.seen)

    @contextmanager
    def _running(self) -> Iterator[ProbeSession]:
        domain = find_domain(self._conn, DOMAIN)
        self.serial.unlink(missing_ok=True)
        start_servers(self._conn, DOMAIN)
        try:
            with libvirt_errors(DOMAIN, "start"):
                domain.create()
            with (self.folder / "serial.log").open("ab", buffering=0) as log:
                yield attach_probe(self.serial, log=log)
        finally:
            if domain.isActive():
                domain.destroy()
            stop_servers(self._conn, DOMAIN)

    def _freeze(self, name: str, memory: Path | None = None) -> None:
        frozen = self._top()
        report = create_snapshot(self._conn, DOMAIN, name, memory=memory)
        self.points.append(Point(name, frozen, self._expected()))
        held = "" if report.pause is None else f", its requests waited {report.pause.stalled:.1f} ms"
        size = "" if memory is None else f", its memory ({memory.stat().st_size // KIB} KiB) is of the same instant"
        self.say(f"snapshot {name}: the running guest goes on in {report.disks[0].overlay.name}{held}{size}")

    def _make_a_mistake(self, probe: ProbeSession) -> None:
        region = self._region("never changed")
        probe.pattern(_MISTAKE_SEED, region.offset, 256 * KIB)
        region.content[: 256 * KIB] = pattern(_MISTAKE_SEED, region.offset, 256 * KIB)
        self.say("the guest overwrites what should never change")

    def _go_back(self, then: dict[str, bytes]) -> ProbeSession:
        started = time.monotonic()
        revert(self._conn, DOMAIN, "with-memory", discard=True)
        for region in self.regions:
            region.content[:] = then[region.name]
        probe = attach_probe(self.serial)
        self._compare("domain", self._top().name, probe)
        seconds = time.monotonic() - started
        self.say(f"revert with-memory: the guest runs on where it was, without a boot, after {seconds:.1f} s")
        return probe

    def _delete(self, name: str) -> None:
        started = time.monotonic()
        report = delete(self._conn, DOMAIN, name)
        self.points = [point for point in self.points if point.name != name]
        lines = "; ".join(
            line.replace(f"{self.folder}/", "") for work in report.deleted[0].work for line in work.lines()
        )
        self.say(f"delete {name}, while the guest runs: {lines}, in {time.monotonic() - started:.1f} s")

    def _top(self) -> Path:
        path = list_disks(inactive_xml(find_domain(self._conn, DOMAIN)))[0].path
        assert path is not None
        return path
