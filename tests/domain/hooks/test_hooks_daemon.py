"""The hook under a real libvirtd: refused starts as virsh tells them, a clean disk each run, snapshots after a stop."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap import create_image, open_chain
from qemu_vmdk_snap.domain.connect import open_connection
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.doctor.domain import repair_domain
from qemu_vmdk_snap.domain.hooks import install as hooks
from qemu_vmdk_snap.domain.registry import list_snapshots
from qemu_vmdk_snap.harness import ProbeSession, attach, disk_image, pattern
from tests.domain.lab import MIB, xml_of
from tests.domain.libvirtd import Daemon, obstacle

if TYPE_CHECKING:
    import libvirt

pytestmark = pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64")

REGION, AT, SEED = 64 * 1024, 2 * MIB, 0x5EED
CLEAN = zlib.crc32(bytes(REGION))
WRITTEN = zlib.crc32(pattern(SEED, AT, REGION))


class HookedDaemon:
    """A private daemon with the hook in its folder, and domains that boot the probe."""

    def __init__(self, folder: Path) -> None:
        self.daemon = Daemon(folder)
        self.folder = folder
        # As the daemon sees it, in its mount namespace, this is /etc/libvirt/hooks/qemu.d.
        hooks.install(
            folder / "etc" / "hooks" / "qemu.d",
            folder / "policies",
            {"QEMU_VMDK_SNAP_STATE": str(folder / "state")},
        )
        self.daemon.start()
        self.conn = open_connection(self.daemon.uri)
        self._number = 0

    def policy(self, domain: libvirt.virDomain, *lines: str) -> None:
        text = "\n".join([*lines, f'connect = "{self.daemon.uri}"'])
        (self.folder / "policies" / f"{domain.name()}.toml").write_text(text)

    def domain(self, *, snapshot: bool = False) -> libvirt.virDomain:
        """Return a new domain whose only disk boots the probe; with a snapshot, there is something to go back to."""
        self._number += 1
        name = f"h{self._number}"
        disk = self.folder / f"{name}.vmdk"
        create_image(disk, 16 * MIB, durable=False)
        with open_chain(disk, writable=True) as chain:
            chain.write_at(0, disk_image())
        domain = self.conn.defineXML(
            f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory>"
            "<os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/></os><features><acpi/></features><devices>"
            "<emulator>/usr/bin/qemu-system-x86_64</emulator>"
            f"<disk type='file' device='disk'><driver name='qemu' type='vmdk'/><source file='{disk}'/>"
            "<target dev='sda' bus='sata'/></disk><memballoon model='none'/>"
            f"<serial type='unix'><source mode='bind' path='{self.serial(name)}'/><target port='0'/></serial>"
            "</devices></domain>"
        )
        if snapshot:
            create_snapshot(self.conn, name, "clean")
        return domain

    def serial(self, name: str) -> Path:
        return self.folder / f"{name}.sock"

    def start(self, domain: libvirt.virDomain) -> ProbeSession:
        """Start the domain by virsh and return the session with its guest."""
        self.serial(domain.name()).unlink(missing_ok=True)
        self.daemon.virsh("start", domain.name())
        return attach(self.serial(domain.name()), seconds=40)

    def close(self) -> None:
        import libvirt

        for domain in self.conn.listAllDomains():
            if domain.isActive():
                domain.destroy()
            domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
        self.conn.close()
        self.daemon.stop()


@pytest.fixture(scope="module")
def hooked(scratch_root: Path) -> Iterator[HookedDaemon]:
    if reason := obstacle():
        pytest.skip(reason)
    if os.geteuid():
        pytest.skip("libvirt runs hooks from /etc/libvirt alone: only root can put a folder of its own over that")
    hooked = HookedDaemon(scratch_root / "w")
    yield hooked
    hooked.close()


@pytest.fixture(autouse=True)
def state(hooked: HookedDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEMU_VMDK_SNAP_STATE", str(hooked.folder / "state"))


def wait_for(condition: Callable[[], object], seconds: float = 100.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def after_stop_ends(hooked: HookedDaemon, domain: libvirt.virDomain) -> None:
    """Return when the process of the hook that has taken a snapshot after a stop, and maybe prunes, has ended."""
    words = f"\0after-stop\0{domain.name()}\0--policy\0{hooked.folder}/".encode()

    def runs() -> bool:
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if words in (process / "cmdline").read_bytes():
                    return True
        return False

    wait_for(lambda: not runs())


def has_snapshots(hooked: HookedDaemon, domain: libvirt.virDomain, count: int) -> bool:
    return len(list_snapshots(hooked.conn, domain.name())) == count


def top_of(domain: libvirt.virDomain) -> Path:
    from qemu_vmdk_snap.domain.xml import list_disks

    (disk,) = list_disks(xml_of(domain))
    assert disk.path is not None
    return disk.path


def power_off(probe: ProbeSession, domain: libvirt.virDomain) -> None:
    probe.power_off()
    wait_for(lambda: not domain.isActive())
    probe.close()


def test_a_refused_start_shows_our_reason(hooked: HookedDaemon) -> None:
    domain = hooked.domain(snapshot=True)
    hooked.policy(domain, 'verify = "chain"')
    power_off(hooked.start(domain), domain)  # whole, it starts
    base = top_of(domain).with_name(f"{domain.name()}.vmdk")
    with open_chain(base, writable=True) as chain:
        chain.write_at(AT, b"behind the back of its overlay".ljust(512))
    done = subprocess.run(
        ["virsh", "-c", hooked.daemon.uri, "start", domain.name()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    reason = f"qemu-vmdk-snap: domain {domain.name()}: {top_of(domain)}: parentCID = "
    assert reason in done.stderr
    assert "the parent was modified after the overlay was made" in done.stderr
    assert reason in (hooked.folder / "libvirtd.log").read_text()
    assert not domain.isActive()
    other = hooked.domain()
    power_off(hooked.start(other), other)  # nobody else is held up


def test_each_run_begins_with_a_clean_disk(hooked: HookedDaemon) -> None:
    domain = hooked.domain(snapshot=True)
    hooked.policy(domain, "revert-on-start = true", 'verify = "chain"')
    xml, base = xml_of(domain), (hooked.folder / f"{domain.name()}.vmdk").read_bytes()
    for ending in (power_off, lambda _probe, domain: domain.destroy(), power_off):
        probe = hooked.start(domain)
        assert probe.crc(AT, REGION) == CLEAN
        probe.pattern(SEED, AT, REGION)
        assert probe.crc(AT, REGION) == WRITTEN
        ending(probe, domain)
        with open_chain(top_of(domain)) as chain:
            assert zlib.crc32(chain.read_at(AT, REGION)) == WRITTEN  # to be looked at until the next start
    assert xml_of(domain) == xml
    assert (hooked.folder / f"{domain.name()}.vmdk").read_bytes() == base
    assert [snapshot.problem for info in list_snapshots(hooked.conn, domain.name()) for snapshot in info.disks] == [
        None
    ]


def test_without_a_snapshot_there_is_nothing_to_go_back_to(hooked: HookedDaemon) -> None:
    import libvirt

    domain = hooked.domain()
    hooked.policy(domain, "revert-on-start = true")
    before = top_of(domain).read_bytes()
    with pytest.raises(libvirt.libvirtError, match="has no parent: it is not an overlay"):
        domain.create()
    assert top_of(domain).read_bytes() == before


def test_a_snapshot_follows_each_stop_but_not_a_refused_start(hooked: HookedDaemon) -> None:
    import libvirt

    domain = hooked.domain()
    hooked.policy(domain, "snapshot-after-stop = true", 'verify = "chain"')
    for run in (1, 2):
        frozen = top_of(domain)
        probe = hooked.start(domain)
        probe.pattern(SEED + run, AT, REGION)
        power_off(probe, domain)
        wait_for(partial(has_snapshots, hooked, domain, run))
        after_stop_ends(hooked, domain)
        (current,) = [info for info in list_snapshots(hooked.conn, domain.name()) if info.current]
        assert current.name.startswith("stop-")
        assert current.disks[0].frozen == frozen
        with open_chain(frozen) as chain:
            assert chain.read_at(AT, REGION) == pattern(SEED + run, AT, REGION)
    assert not list((hooked.folder / "state").glob("*.json"))
    base = hooked.folder / f"{domain.name()}.vmdk"
    base.rename(base.with_suffix(".away"))
    with pytest.raises(libvirt.libvirtError, match=r"its parent '.*' does not exist"):
        domain.create()
    base.with_suffix(".away").rename(base)
    time.sleep(1.0)
    assert len(list_snapshots(hooked.conn, domain.name())) == 2


def test_of_the_snapshots_after_a_stop_the_last_stay(hooked: HookedDaemon) -> None:
    domain = hooked.domain(snapshot=True)
    hooked.policy(domain, "snapshot-after-stop = true", "keep-last = 2")

    def names() -> list[str]:
        return [info.name for info in list_snapshots(hooked.conn, domain.name())]

    for run in (1, 2, 3):
        before = set(names())
        probe = hooked.start(domain)
        probe.pattern(SEED + run, AT + run * REGION, REGION)
        power_off(probe, domain)
        wait_for(lambda before=before: set(names()) - before)  # type: ignore[misc]
        after_stop_ends(hooked, domain)
    assert len(names()) == 3
    assert not list((hooked.folder / "state").glob("*.json"))
    assert names()[0] == "clean"
    assert all(name.startswith("stop-") for name in names()[1:])
    with open_chain(top_of(domain)) as chain:  # what the deleted one held is there
        for run in (1, 2, 3):
            assert chain.read_at(AT + run * REGION, REGION) == pattern(SEED + run, AT + run * REGION, REGION)
    power_off(hooked.start(domain), domain)


def test_a_restarted_daemon_leaves_the_guest_alone(hooked: HookedDaemon) -> None:
    domain = hooked.domain(snapshot=True)
    hooked.policy(domain, 'verify = "chain"')
    probe = hooked.start(domain)
    hooked.policy(domain, "no = policy")
    hooked.conn.close()
    hooked.daemon.restart()
    hooked.conn = open_connection(hooked.daemon.uri)
    domain = hooked.conn.lookupByName(domain.name())
    assert domain.isActive()
    assert probe.crc(AT, REGION) == CLEAN
    power_off(probe, domain)


def test_a_live_xml_that_was_defined_is_not_started_until_it_is_repaired(hooked: HookedDaemon) -> None:
    """`virsh dumpxml` of a running domain, `virsh define`: the next start would write into the frozen file."""
    domain = hooked.domain()
    name = domain.name()
    hooked.policy(domain, 'verify = "chain"')
    hooked.daemon.virsh("start", name)
    create_snapshot(hooked.conn, name, "live")
    live = hooked.folder / "live.xml"
    live.write_text(hooked.daemon.virsh("dumpxml", name))
    hooked.daemon.virsh("define", str(live))
    hooked.daemon.virsh("destroy", name)
    words = ["virsh", "-c", hooked.daemon.uri, "start", name]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"{name}.vmdk backs {hooked.folder}/{name}-000001.vmdk, which would read what the guest" in done.stderr
    assert repair_domain(hooked.conn, name)
    hooked.daemon.virsh("start", name)
    assert f"{name}-000001.vmdk" in hooked.daemon.virsh("domblklist", name)
    domain.destroy()
