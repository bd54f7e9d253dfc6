"""Any snapshot of a running guest is deleted: the guest, and every snapshot that stays, read what they read."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap import open_chain
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.delete.run import delete
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.registry import list_snapshots
from tests.e2e.live_chain import ChainGuest, both
from tests.e2e.live_guest import Progress, Writer, check_frozen

if TYPE_CHECKING:
    import libvirt

pytestmark = [pytest.mark.needs("libvirt", "qemu-system-x86_64", "qemu-img"), pytest.mark.timeout(300)]

ROUNDS = int(os.environ.get("VMDK_LIVE_ROUNDS", "8"))


@pytest.fixture
def guest(embed: libvirt.virConnect, scratch: Path, request: pytest.FixtureRequest) -> Iterator[ChainGuest]:
    guest = ChainGuest(embed, scratch, disks=getattr(request, "param", 1), links=2)
    yield guest
    guest.close()


def frozen_files(guest: ChainGuest) -> dict[str, list[Path]]:
    """Return what each snapshot froze, by name."""
    return {
        info.name: [disk.frozen for disk in info.disks if disk.frozen is not None]
        for info in list_snapshots(guest.conn, guest.name)
    }


def check_sound(guest: ChainGuest, expected: dict[str, list[tuple[int, int]]]) -> None:
    """Check that the snapshots there are read what they did, by two readers, and that XML and files say the same."""
    found = frozen_files(guest)
    assert set(found) == set(expected)
    for name, frozen in found.items():
        assert list(both(frozen).values()) == expected[name], name
    named = {path for files in guest.disks.values() for path in files}
    assert {path for path in guest.folder.glob("*.vmdk")} == named
    for files in guest.disks.values():
        with open_chain(files[0], lock=False) as chain:
            assert [link.path for link in chain.links] == list(files)
    for info in list_snapshots(guest.conn, guest.name):
        assert [disk.problem for disk in info.disks] == [None] * len(info.disks)
    assert IntentStore.of(guest.conn).uuids() == []
    assert not list(guest.folder.glob(".*"))


@pytest.mark.parametrize("guest", [1, 2], indirect=True, ids=["one disk", "two disks"])
def test_created_and_deleted_at_random_while_the_guest_writes(guest: ChainGuest) -> None:
    choose = random.Random(7)
    expected = {name: list(both(files).values()) for name, files in frozen_files(guest).items()}
    points: dict[str, tuple[Progress, Progress]] = {}
    with Writer(guest.probe) as writer:
        for number in range(ROUNDS):
            for name in (f"s{number}", f"t{number}")[: 2 if number < 3 else 1]:
                before = writer.progress
                create_snapshot(guest.conn, guest.name, name)
                points[name] = before, writer.progress
                expected[name] = list(both(frozen_files(guest)[name]).values())
                writer.wait(1)
            name = choose.choice(sorted(expected))
            report = delete(guest.conn, guest.name, name)
            assert [one.name for one in report.deleted] == [name]
            del expected[name]
            writer.wait(1)
            check_sound(guest, expected)
            kept = {path for frozen in frozen_files(guest).values() for path in frozen}
            for files in guest.disks.values():  # no more links than snapshots, one that is frozen, and the top
                assert len([path for path in files[1:] if path not in kept]) <= 1
    for name, frozen in frozen_files(guest).items():
        if name in points:
            check_frozen(frozen[0], *points[name])
    shown = guest.guest_sees()
    guest.domain.destroy()
    guest.probe.close()
    guest.start()
    assert guest.guest_sees() == shown
