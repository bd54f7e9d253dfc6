"""Snapshots of a guest that writes all the time."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap import DomainError, create_image, open_chain
from qemu_vmdk_snap.domain.create import run as snapshot
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.journal.recover import recover
from qemu_vmdk_snap.domain.qemu import switch as live
from qemu_vmdk_snap.domain.qemu.depth import max_links
from qemu_vmdk_snap.domain.qemu.monitor import Monitor
from qemu_vmdk_snap.domain.registry import list_snapshots, snapshot_info
from qemu_vmdk_snap.domain.xml import list_disks
from qemu_vmdk_snap.harness import ProbeSession, verify_image
from tests.domain.lab import contents, xml_of
from tests.e2e.live.live_guest import MIB, REGION, STARTS, Progress, Writer, boot_disk, check_frozen, domain_xml, start

if TYPE_CHECKING:
    import libvirt


pytestmark = [pytest.mark.needs("libvirt", "qemu-system-x86_64"), pytest.mark.timeout(300)]
_numbers = itertools.count(1)


class Guest:
    """A domain with a boot disk and a second one, the probe running in it."""

    def __init__(self, conn: libvirt.virConnect, folder: Path, **options: str) -> None:
        self.conn, self.folder = conn, folder
        self.name = f"live{next(_numbers)}"
        self.serial = folder / "serial"
        create_image(folder / "b.vmdk", 8 * MIB, durable=False)
        disks = [boot_disk(folder / "a.vmdk"), folder / "b.vmdk"]
        self.domain = conn.defineXML(domain_xml(self.name, disks, self.serial, **options))
        self.probe = self.start()

    def start(self) -> ProbeSession:
        self.probe = start(self.domain, self.serial)
        return self.probe

    def images(self) -> dict[str, str]:
        return {path: digest for path, digest in contents(self.folder).items() if path.endswith(".vmdk")}

    def close(self) -> None:
        import libvirt

        self.probe.close()
        if self.domain.isActive():
            self.domain.destroy()
        self.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)


@pytest.fixture
def guest(embed: libvirt.virConnect, scratch: Path) -> Iterator[Guest]:
    guest = Guest(embed, scratch)
    yield guest
    guest.close()


def is_running(domain: libvirt.virDomain) -> bool:
    import libvirt

    return bool(domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING)


def test_a_hundred_snapshots_of_a_guest_that_writes(guest: Guest) -> None:
    """Fewer only where libvirt could not start a chain of so many links."""
    count = min(100, max_links(guest.conn.getLibVersion()) - 1)
    points: list[tuple[Path, Progress, Progress]] = []
    with Writer(guest.probe) as writer:
        for number in range(count):
            before = writer.progress
            report = create_snapshot(guest.conn, guest.name, f"s{number}", exclude=["vdb"])
            points.append((report.disks[0].frozen, before, writer.progress))
            assert report.pause is not None
            writer.wait(1)
    passed = Monitor(guest.domain).execute("query-fdsets")
    assert sum(len(fdset["fds"]) for fdset in passed) == 0  # QEMU has its own copies, and no more descriptors are left
    shown = [check_frozen(*point) for point in points]
    assert shown == sorted(shown)
    assert shown[-1] > count * 9 // 10
    last = writer.progress.ended
    top = guest.folder / f"a-{count:06}.vmdk"
    check_frozen(top, Progress(last, last), Progress(last, last))
    guest.domain.destroy()
    with open_chain(top) as chain:
        assert chain.depth == count + 1
    # The guest itself reads every link of the chain, and the whole chain starts from the persistent XML.
    assert verify_image(top).mismatches == ()
    probe = guest.start()
    with open_chain(top, lock=False) as chain:
        for offset in STARTS:
            assert probe.crc(offset, REGION) == zlib.crc32(chain.read_at(offset, REGION))


def test_an_idle_disk_is_stopped_for_and_its_cid_fits(guest: Guest) -> None:
    """Nothing was written since QEMU opened it: QEMU would still change the CID."""
    report = create_snapshot(guest.conn, guest.name, "s1")
    assert report.pause is not None
    assert report.pause.stopped is not None
    guest.probe.pattern(1, STARTS[0], REGION)
    second = create_snapshot(guest.conn, guest.name, "s2", exclude=["vdb"])
    assert second.pause is not None
    assert second.pause.stopped is None  # settled: no need to
    guest.probe.pattern(2, STARTS[1], REGION)
    guest.domain.destroy()
    with open_chain(guest.folder / "a-000002.vmdk") as chain:  # the CIDs fit
        assert chain.depth == 3
    assert guest.start().crc(STARTS[0], REGION)


def test_a_first_write_between_overlay_and_stop_is_noticed(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = live._try, []

    def write_then_try(run: live._Run) -> bool:
        calls.append(1)
        if len(calls) == 1:
            guest.probe.pattern(7, STARTS[0], REGION)
        return real(run)

    monkeypatch.setattr(live, "_try", write_then_try)
    create_snapshot(guest.conn, guest.name, "s1")
    assert len(calls) == 2
    guest.probe.pattern(8, STARTS[1], REGION)
    guest.domain.destroy()
    with open_chain(guest.folder / "a-000001.vmdk") as chain:
        assert chain.depth == 2


def test_libvirt_knows_it_and_the_persistent_xml_names_the_chain(guest: Guest) -> None:
    create_snapshot(guest.conn, guest.name, "s1", "first")
    create_snapshot(guest.conn, guest.name, "s2")
    info = snapshot_info(guest.conn, guest.name, "s2")
    assert (info.state, info.parent, info.location, info.current) == ("disk-snapshot", "s1", "external", True)
    disk = list_disks(xml_of(guest.domain))[0]
    assert (disk.path, disk.backing) == (
        guest.folder / "a-000002.vmdk",
        (guest.folder / "a-000001.vmdk", guest.folder / "a.vmdk"),
    )
    assert is_running(guest.domain)


def test_a_paused_guest_stays_paused(guest: Guest) -> None:
    guest.domain.suspend()
    report = create_snapshot(guest.conn, guest.name, "s1")
    assert not is_running(guest.domain)
    assert report.pause is not None
    assert report.pause.stopped is None
    guest.domain.resume()
    guest.probe.pattern(1, STARTS[0], REGION)


def test_quiesce_without_an_agent(guest: Guest) -> None:
    report = create_snapshot(guest.conn, guest.name, "s1", quiesce="auto")
    assert report.pause is not None
    assert "its file systems cannot be frozen" in report.pause.notes[0]
    before = (xml_of(guest.domain), guest.images())
    with pytest.raises(DomainError, match="its file systems cannot be frozen: "):
        create_snapshot(guest.conn, guest.name, "s2", quiesce="require")
    assert (xml_of(guest.domain), guest.images()) == before
    assert is_running(guest.domain)


def test_a_transient_domain_is_refused(embed: libvirt.virConnect, scratch: Path) -> None:
    disk = boot_disk(scratch / "a.vmdk")
    domain = embed.createXML(domain_xml("transient", [disk], scratch / "serial"))
    try:
        with pytest.raises(DomainError, match="is transient: without a persistent XML"):
            create_snapshot(embed, "transient")
    finally:
        domain.destroy()
    assert sorted(path.name for path in scratch.glob("*.vmdk")) == ["a.vmdk"]


def test_a_persistent_xml_that_names_other_files_is_refused(guest: Guest) -> None:
    other = guest.folder / "other.vmdk"
    create_image(other, 8 * MIB)
    guest.conn.defineXML(xml_of(guest.domain).replace(f"{guest.folder}/b.vmdk", str(other)))
    with pytest.raises(DomainError, match=r"disk vdb: the persistent XML names .*other.vmdk, but QEMU writes to"):
        create_snapshot(guest.conn, guest.name)
    create_snapshot(guest.conn, guest.name, exclude=["vdb"])


# All disks or none: the second one fails at each step in turn.


def fail_at(monkeypatch: pytest.MonkeyPatch, command: str, at: int, *, after: bool = False) -> None:
    """Make QEMU refuse the command, at so many calls of it."""
    real: Callable[..., object] = Monitor.execute
    calls = itertools.count(1)

    def broken(self: Monitor, name: str, /, **arguments: object) -> object:
        fails = name == command and next(calls) == at
        answer = real(self, name, **arguments) if after or not fails else None
        if fails:
            raise DomainError("test", f"QEMU refuses {name}: so says the test")
        return answer

    monkeypatch.setattr(Monitor, "execute", broken)


STEPS: dict[str, tuple[str, int]] = {
    "descriptor": ("add-fd", 2),
    "descriptor dropped": ("remove-fd", 2),
    "file node": ("blockdev-add", 3),
    "format node": ("blockdev-add", 4),
    "stop": ("stop", 1),
    "transaction": ("transaction", 1),
}


@pytest.mark.parametrize("step", STEPS)
def test_the_second_disk_fails_and_all_is_as_before(guest: Guest, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    create_snapshot(guest.conn, guest.name, "s1")
    monitor = Monitor(guest.domain)
    with Writer(guest.probe) as writer:
        nodes, fdsets = monitor.nodes(), len(monitor.execute("query-fdsets"))
        xml_before, files = xml_of(guest.domain), set(guest.images())
        with monkeypatch.context() as broken:
            fail_at(broken, *STEPS[step])
            with pytest.raises(DomainError, match="so says the test") as error:
                create_snapshot(guest.conn, guest.name, "s2")
        assert "undoing it failed" not in str(error.value)
        assert xml_of(guest.domain) == xml_before
        assert set(guest.images()) == files
        assert (monitor.nodes(), len(monitor.execute("query-fdsets"))) == (nodes, fdsets)
        assert [info.name for info in list_snapshots(guest.conn, guest.name)] == ["s1"]
        assert IntentStore.of(guest.conn).uuids() == []
        assert is_running(guest.domain)
        writer.wait(2)
        create_snapshot(guest.conn, guest.name, "s2")


def test_the_real_qemu_refuses_the_second_disk(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No patched monitor: the overlay of the second disk is no VMDK by the time that QEMU opens it."""
    real = live._add

    def spoil(run: live._Run) -> None:
        run.disks[1].overlay.write_bytes(b"spoilt" * 200)
        real(run)

    files = set(guest.images())
    with Writer(guest.probe) as writer:
        with monkeypatch.context() as broken:
            broken.setattr(live, "_add", spoil)
            with pytest.raises(DomainError, match="QEMU refuses blockdev-add"):
                create_snapshot(guest.conn, guest.name, "s1")
        writer.wait(2)
    left = set(guest.images()) - files
    # What is no overlay of ours any more is nobody's to unlink; the record tells of it.
    assert left <= {str(guest.folder / f"{disk}-000001.vmdk") for disk in "ab"}
    assert is_running(guest.domain)
    IntentStore.of(guest.conn).remove(guest.domain.UUIDString())


# Death of the command between any two steps; the guest runs on.


def die(guest: Guest, monkeypatch: pytest.MonkeyPatch, home: ModuleType, name: str, *, after: bool = False) -> None:
    """Leave the snapshot s1 as a command leaves it that dies in `name`: nobody undoes anything."""
    real: Callable[..., object] = getattr(home, name)

    def dies(*args: object, **options: object) -> None:
        if after:
            real(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(home, name, dies)
        dying.setattr(snapshot, "_undo", lambda *_: None)
        dying.setattr(live, "drop", lambda *_: None)
        dying.setattr(live, "_switched", lambda *_: True)
        with pytest.raises(KeyboardInterrupt):
            create_snapshot(guest.conn, guest.name, "s1")
    assert IntentStore.of(guest.conn).read(guest.domain.UUIDString()) is not None


DEATHS: dict[str, tuple[ModuleType, str, bool, bool]] = {
    "overlays made": (snapshot, "_define", False, False),
    "defined": (snapshot, "_define", True, False),
    "registered": (snapshot, "register", True, False),
    "nodes added": (live, "_try", False, False),
    "switched": (live, "_try", True, True),
}


@pytest.mark.parametrize("moment", DEATHS)
def test_a_death_is_settled_while_the_guest_runs(guest: Guest, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    home, name, after, finished = DEATHS[moment]
    before, files = xml_of(guest.domain), set(guest.images())
    with Writer(guest.probe) as writer:
        die(guest, monkeypatch, home, name, after=after)
        writer.wait(2)
        (result,) = recover(guest.conn)
        assert (result.finished, result.left) == (finished, ())
        assert (xml_of(guest.domain) == before) is not finished
        assert (set(guest.images()) == files) is not finished
        assert guest.domain.snapshotNum() == (1 if finished else 0)
        writer.wait(2)
        create_snapshot(guest.conn, guest.name, "s2")
        writer.wait(2)
    guest.domain.destroy()
    guest.start()


@pytest.mark.parametrize("moment", DEATHS)
def test_a_death_and_then_the_end_of_the_guest(guest: Guest, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    home, name, after, _ = DEATHS[moment]
    with Writer(guest.probe) as writer:
        die(guest, monkeypatch, home, name, after=after)
        writer.wait(2)
    last = writer.progress.ended
    guest.domain.destroy()
    (result,) = recover(guest.conn)
    assert result.finished is (moment != "overlays made")
    # Whatever became of the snapshot, the domain has what the guest wrote last.
    (top, _) = (disk.path for disk in list_disks(xml_of(guest.domain)))
    assert top is not None
    check_frozen(top, Progress(last, last), Progress(last, last))
    probe = guest.start()
    assert probe.crc(STARTS[0], REGION)


def test_a_guest_left_stopped_is_resumed(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., object] = Monitor.execute

    def dies(self: Monitor, name: str, /, **arguments: object) -> object:
        if name in ("transaction", "cont"):
            raise KeyboardInterrupt
        return real(self, name, **arguments)

    with monkeypatch.context() as dying:
        dying.setattr(Monitor, "execute", dies)
        dying.setattr(snapshot, "_undo", lambda *_: None)
        dying.setattr(live, "drop", lambda *_: None)
        dying.setattr(live, "_switched", lambda *_: True)
        with pytest.raises(KeyboardInterrupt):
            create_snapshot(guest.conn, guest.name, "s1")
    assert not is_running(guest.domain)
    (result,) = recover(guest.conn)
    assert not result.finished
    assert is_running(guest.domain)
    guest.probe.pattern(1, STARTS[0], REGION)


def test_the_switch_is_never_taken_back(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU did it, but its answer was lost: the error says so, and the next command finishes."""
    with monkeypatch.context() as broken:
        fail_at(broken, "transaction", 1, after=True)
        with pytest.raises(DomainError, match="QEMU writes to the overlays already"):
            create_snapshot(guest.conn, guest.name, "s1")
    guest.probe.pattern(1, STARTS[0], REGION)
    report = create_snapshot(guest.conn, guest.name, "s2")
    assert report.recovered is not None
    assert report.recovered.finished
    assert [info.name for info in list_snapshots(guest.conn, guest.name)] == ["s1", "s2"]


def test_owner_mode_and_attributes_follow_the_base(guest: Guest) -> None:
    base = guest.folder / "a.vmdk"
    base.chmod(0o640)
    create_snapshot(guest.conn, guest.name, "s1")
    assert (guest.folder / "a-000001.vmdk").stat().st_mode & 0o777 == 0o640
