"""A guest on served disks: it boots both ways, is snapshotted while it writes, and resumes from memory."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap import check_image, open_chain
from qemu_vmdk_snap.domain.attach.run import attach, detach
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.delete.run import delete
from qemu_vmdk_snap.domain.doctor.domain import check_domain
from qemu_vmdk_snap.domain.dry_run import plan_delete
from qemu_vmdk_snap.domain.needs.needed import Needed
from qemu_vmdk_snap.domain.qemu.monitor import Monitor
from qemu_vmdk_snap.domain.registry import list_snapshots, snapshot_info
from qemu_vmdk_snap.domain.revert.run import revert
from qemu_vmdk_snap.domain.served.commands import stop_servers
from qemu_vmdk_snap.domain.state import inactive_xml
from qemu_vmdk_snap.domain.xml import list_disks
from qemu_vmdk_snap.domain.xml.served import served_disks
from qemu_vmdk_snap.errors import DomainError
from qemu_vmdk_snap.harness import ProbeSession, pattern
from qemu_vmdk_snap.harness.probe import parse_answer
from tests.domain.lab import xml_of
from tests.domain.served.guests import ServedGuest, written_by
from tests.e2e.live.live_guest import MIB, SECTOR, STARTS, Progress, Writer, check_frozen

if TYPE_CHECKING:
    import libvirt

pytestmark = [pytest.mark.needs("libvirt", "qemu-system-x86_64"), pytest.mark.timeout(300)]
AT, LENGTH = 2 * MIB, 16 * MIB


@pytest.fixture
def guest(embed: libvirt.virConnect, scratch: Path) -> Iterator[ServedGuest]:
    guest = ServedGuest(embed, scratch, second=True)
    yield guest
    guest.close()


def test_it_boots_served_and_direct_and_what_it_writes_stays(guest: ServedGuest) -> None:
    direct = xml_of(guest.domain)
    assert sorted(served_disks(direct)) == ["sda", "vdb"]
    probe = guest.start()
    probe.pattern(1, AT, 64 * 1024)
    seen = probe.crc(AT, 64 * 1024)
    with pytest.raises(DomainError, match="runs: how a disk is attached"):
        detach(guest.conn, guest.name, ["sda"])
    create_snapshot(guest.conn, guest.name, "s1")
    guest.domain.destroy()
    probe.close()
    report = detach(guest.conn, guest.name, [])
    assert [disk.target for disk in report.disks] == ["sda", "vdb"]
    assert not served_disks(xml_of(guest.domain))
    assert "nbd" not in xml_of(guest.domain)
    guest.serial.unlink(missing_ok=True)
    guest.domain.create()  # no server: QEMU opens the chain itself
    assert guest.probe().crc(AT, 64 * 1024) == seen
    guest.domain.destroy()
    assert attach(guest.conn, guest.name, ["sda"]).changed
    assert not attach(guest.conn, guest.name, ["sda"]).changed
    assert sorted(served_disks(xml_of(guest.domain))) == ["sda"]


def test_disks_of_both_kinds_are_snapshotted_at_one_instant_under_writes(guest: ServedGuest) -> None:
    detach(guest.conn, guest.name, ["vdb"])
    probe = guest.start()
    with Writer(probe) as writer:
        for name in ("s1", "s2"):
            before = writer.progress
            report = create_snapshot(guest.conn, guest.name, name)
            assert report.pause is not None
            assert [disk.target for disk in report.disks] == ["sda", "vdb"]
            frozen = (report.disks[0].frozen, before, writer.progress)
            writer.wait(1)
            check_frozen(*frozen)
    assert snapshot_info(guest.conn, guest.name, "s2").state == "disk-snapshot"
    probe.close()
    files = Needed.read(guest.conn, guest.domain).files_of(Needed.read(guest.conn, guest.domain).holders)
    assert {guest.folder / "a.vmdk", guest.folder / "a-000002.vmdk"} <= set(files)


def test_memory_and_disk_are_of_one_instant_and_the_guest_resumes_there(
    embed: libvirt.virConnect, scratch: Path
) -> None:
    """A guest in the middle of a long write: what it has in memory and what is on disk fit, and it writes on."""
    guest = ServedGuest(embed, scratch, size=20 * MIB)
    try:
        probe = guest.start()
        sequence = f"{probe._sequence + 1:02x}"
        written = guest.writes()
        writing = threading.Thread(target=probe.pattern, args=(7, AT, LENGTH))
        writing.start()
        while guest.writes() < written + 100:
            assert writing.is_alive()
            time.sleep(0.01)
        memory = scratch / "m1.memory"
        report = create_snapshot(guest.conn, guest.name, "m1", memory=memory)
        frozen = report.disks[0].frozen
        writing.join()
        probe.pattern(8, AT, MIB)  # the future that is given up
        done = written_by(frozen, 7, AT, LENGTH)
        assert 0 < done < LENGTH // SECTOR, "the snapshot was not taken in the middle of the write"
        info = snapshot_info(guest.conn, guest.name, "m1")
        assert (info.state, info.location, info.memory_file) == ("running", "external", memory)
        probe.close()
        back = revert(guest.conn, guest.name, "m1", after="paused", discard=True)
        assert back.state == "paused"
        assert counter_in_memory(guest, scratch / "ram") in range(done - 1, done + 128)
        top = back.disks[0].overlay
        assert written_by(top, 7, AT, LENGTH) == done  # paused: nothing was written yet
        with socket.socket(socket.AF_UNIX) as serial:
            serial.settimeout(60)
            serial.connect(str(guest.serial))
            guest.domain.resume()
            answer = parse_answer(serial.makefile("rb").readline().strip())
        assert answer == (sequence, True, "")  # to the command that it was in the middle of
        guest.domain.destroy()
    finally:
        guest.close()
    with open_chain(top) as chain:
        assert chain.read_at(AT, LENGTH) == pattern(7, AT, LENGTH)
    assert written_by(frozen, 7, AT, LENGTH) == done


def test_any_snapshot_is_deleted_inside_the_server_while_the_guest_writes(guest: ServedGuest) -> None:
    probe = guest.start()
    points: dict[str, tuple[Path, Progress, Progress]] = {}
    memory = guest.folder / "m.memory"
    with Writer(probe) as writer:
        for number in range(5):
            before = writer.progress
            file = memory if number == 2 else None
            report = create_snapshot(guest.conn, guest.name, f"s{number}", memory=file)
            points[f"s{number}"] = (report.disks[0].frozen, before, writer.progress)
            writer.wait(1)
        for name in ("s2", "s0", "s4"):  # in the middle with its memory, the base, the newest
            plan = plan_delete(guest.conn, guest.name, name)
            done = delete(guest.conn, guest.name, name)
            assert [one.as_dict() for one in plan.deleted] == [one.as_dict() for one in done.deleted]
            assert not points.pop(name)[0].exists()
            writer.wait(1)
            for frozen in points.values():
                check_frozen(*frozen)
        assert not memory.exists()
    delete_slowly(guest, probe)
    assert [snapshot.name for snapshot in list_snapshots(guest.conn, guest.name)] == ["s1", "s3"]
    seen = probe.crc(STARTS[0], 64 * 1024)
    probe.close()
    guest.domain.destroy()
    stop_servers(guest.conn, guest.name)
    (top,) = [disk.path for disk in list_disks(inactive_xml(guest.domain)) if disk.target == "sda"]
    assert top is not None
    checked = check_image(top, whole_chain=True)
    assert (checked.corruptions, checked.check_errors) == (0, 0)
    assert guest.start().crc(STARTS[0], 64 * 1024) == seen
    assert all(check.verdict != "bad" for check in check_domain(guest.conn, guest.name))
    guest.domain.destroy()
    for act in (delete, plan_delete):
        with pytest.raises(DomainError, match="disk sda: no server of a running guest's disk merges it"):
            act(guest.conn, guest.name, ["s1", "s3"], bandwidth=MIB)
    delete(guest.conn, guest.name, ["s1", "s3"])  # shut off: by the engine


def delete_slowly(guest: ServedGuest, probe: ProbeSession) -> None:
    """Delete a snapshot that froze a mebibyte, at two of them a second."""
    probe.pattern(9, 12 * MIB, MIB)
    create_snapshot(guest.conn, guest.name, "slow")
    began = time.monotonic()
    assert delete(guest.conn, guest.name, "slow", bandwidth=2 * MIB).changed
    assert time.monotonic() - began >= 0.5


def counter_in_memory(guest: ServedGuest, file: Path) -> int:
    """Return the number of the last sector of the pattern that the guest has made in its memory."""
    Monitor(guest.domain).execute("pmemsave", val=0, size=640 * 1024, filename=str(file))
    ram = file.read_bytes()
    wanted = pattern(7, AT, LENGTH)
    there = {ram[at : at + SECTOR] for at in range(0, len(ram), 16) if ram[at : at + 4] != bytes(4)}
    return max(at // SECTOR for at in range(0, LENGTH, SECTOR) if wanted[at : at + SECTOR] in there)


def test_memory_is_refused_where_it_could_not_be_restored(guest: ServedGuest) -> None:
    with pytest.raises(DomainError, match="is shut off: there is no memory"):
        create_snapshot(guest.conn, guest.name, "m", memory=guest.folder / "m")
    detach(guest.conn, guest.name, ["vdb"])
    guest.start().close()
    with pytest.raises(DomainError, match="disk vdb: QEMU's vmdk driver cannot save"):
        create_snapshot(guest.conn, guest.name, "m", memory=guest.folder / "m")
    with pytest.raises(DomainError, match="disk sda is left out: memory without what the guest writes there"):
        create_snapshot(guest.conn, guest.name, "m", memory=guest.folder / "m", exclude=["sda"])
