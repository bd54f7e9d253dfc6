"""How the reports of the commands that change something are shown: for people, or as JSON."""

from __future__ import annotations

from collections.abc import Iterable

from qemu_vmdk_snap.cli.snapshot.options import tell_recovery
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from qemu_vmdk_snap.domain.journal.recover import Recovery
    from qemu_vmdk_snap.domain.overlay.planned import PlannedDisk
    from qemu_vmdk_snap.domain.qemu.switch import Pause


class Report(Protocol):
    """The interface of every report."""

    @property
    def domain(self) -> str:
        """Name of the domain."""

    @property
    def recovered(self) -> Recovery | None:
        """The recovery of an unfinished operation that was found first."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Problems that did not prevent the operation."""


def show(ui: Ui, report: Report, for_programs: dict[str, object], lines: Iterable[str]) -> None:
    """Show the report as JSON or as lines; notes go to standard error."""
    tell_recovery(report.recovered, ui)
    for note in report.notes:
        ui.warn(f"domain {report.domain}: {note}")
    if ui.json_output:
        ui.json(for_programs)
        return
    for line in lines:
        ui.text(line)


def disk_lines(disks: Iterable[PlannedDisk]) -> list[str]:
    """Return a line for the new overlay of each disk."""
    return [
        f"  {disk.target}: {disk.overlay}, backed by {disk.frozen} (chain of {len(disk.chain) + 1})" for disk in disks
    ]


def pause_line(pause: Pause) -> str:
    """Return how long a running guest was stopped."""
    parts = [f"disk requests waited {pause.stalled:.1f} ms"]
    if pause.stopped is not None:
        parts.append(f"its CPUs were stopped for {pause.stopped:.1f} ms")
    if pause.frozen is not None:
        parts.append(f"its file systems were frozen for {pause.frozen:.1f} ms")
    return "the guest kept running: " + ", ".join(parts)
