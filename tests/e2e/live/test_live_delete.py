"""Any snapshot of a running guest is deleted: the guest, and every snapshot that stays, read what they read."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

import qemu_vmdk_snap
from qemu_vmdk_snap import DomainError, NotWhileRunning, open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain import consolidate_domain
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.delete import live, preflight, steps
from qemu_vmdk_snap.domain.delete.plan import State
from qemu_vmdk_snap.domain.delete.prune import Retention, prune
from qemu_vmdk_snap.domain.delete.run import delete
from qemu_vmdk_snap.domain.delete.waiting import waiting
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.qemu.monitor import Monitor
from qemu_vmdk_snap.domain.registry import list_snapshots
from qemu_vmdk_snap.domain.revert.run import revert
from tests.domain.lab import contents, xml_of
from tests.e2e.live.live_chain import ChainGuest, both, content, sums
from tests.e2e.live.live_guest import Progress, Writer, check_frozen
from tests.e2e.live.test_live import fail_at
from tests.support.schemas import check

if TYPE_CHECKING:
    import libvirt

ROUNDS = int(os.environ.get("VMDK_LIVE_ROUNDS", "6"))
PRUNES = int(os.environ.get("VMDK_PRUNE_ROUNDS", "4"))

pytestmark = [
    pytest.mark.needs("libvirt", "qemu-system-x86_64", "qemu-img"),
    pytest.mark.timeout(300 + 20 * max(ROUNDS, PRUNES)),
]


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


def check_sound(guest: ChainGuest, expected: dict[str, list[tuple[int, int]]], *, by_qemu: bool = True) -> None:
    """Check that the snapshots there are read what they did, by two readers, and that XML and files say the same."""
    found = frozen_files(guest)
    assert set(found) == set(expected)
    for name, frozen in found.items():
        assert [content(path) for path in frozen] == [one for one, _ in expected[name]], name
        assert not by_qemu or list(both(frozen).values()) == expected[name], name
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
            check_sound(guest, expected, by_qemu=number % 4 == 3 or number == ROUNDS - 1)
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


def watch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list that gets every command that QEMU is given from now on."""
    real: Callable[..., object] = Monitor.execute
    given: list[str] = []

    def watched(self: Monitor, command: str, /, **arguments: object) -> object:
        given.append(command)
        return real(self, command, **arguments)

    monkeypatch.setattr(Monitor, "execute", watched)
    return given


def state_of(guest: ChainGuest) -> tuple[object, ...]:
    return contents(guest.folder), xml_of(guest.domain), guest.monitor.nodes(), frozen_files(guest)


@pytest.mark.parametrize("guest", [2], indirect=True)
def test_several_on_two_disks_are_one_exchange_as_planned(
    guest: ChainGuest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = guest.conn.getURI()
    with Writer(guest.probe) as writer:
        for number in range(5):
            create_snapshot(guest.conn, guest.name, f"s{number}")
            writer.wait(1)
    expected = {name: list(both(files).values()) for name, files in frozen_files(guest).items()}
    before, words = state_of(guest), ["snapshot", "prune", "-c", uri, guest.name, "--keep-last=2", "--output=json"]
    assert main([*words, "--dry-run"]) == 0
    planned = check("snapshot prune", capsys.readouterr().out)
    assert state_of(guest) == before
    with Writer(guest.probe) as writer, monkeypatch.context() as watching:
        given = watch(watching)
        assert main(words) == 0
        writer.wait(1)
    done = check("snapshot prune", capsys.readouterr().out)
    assert done["deleted"] == planned["deleted"]
    assert (given.count("blockdev-reopen"), given.count("stop")) == (1, 0)
    assert done["pause"]["disk-ms"] > 0
    assert {one["snapshot"] for one in done["deleted"]} == {"off1", "s0", "s1", "s2"}
    lines = [line for one in done["deleted"] for disk in one["disks"] for line in disk["operations"]]
    assert sum(line.startswith("merge ") and line.endswith(" bytes)") for line in lines) == 2
    assert len([line for line in lines if line.startswith("delete ")]) == 8
    assert sum(disk["bytes"] for one in done["deleted"] for disk in one["disks"]) > 8 << 16
    check_sound(guest, {name: expected[name] for name in ("s3", "s4")})
    assert [len(files) for files in guest.disks.values()] == [3, 3]
    assert guest.guest_sees() == sums(guest.disks["sda"][0])


def test_a_guest_that_stands_still_or_was_started_again(guest: ChainGuest) -> None:
    """Its top was never written, its links were opened by libvirt, its vCPUs stop: nothing of it makes a difference."""
    create_snapshot(guest.conn, guest.name, "idle")
    expected = {name: list(both(files).values()) for name, files in frozen_files(guest).items()}
    delete(guest.conn, guest.name, "idle")  # the newest
    del expected["idle"]
    check_sound(guest, expected)
    create_snapshot(guest.conn, guest.name, "again")
    guest.domain.destroy()
    guest.probe.close()
    guest.start()
    expected = {name: list(both(files).values()) for name, files in frozen_files(guest).items()}
    delete(guest.conn, guest.name, "off1")
    del expected["off1"]
    check_sound(guest, expected)
    guest.domain.suspend()
    report = delete(guest.conn, guest.name, "again")
    assert report.pause is not None
    assert not guest.monitor.execute("query-status")["running"]
    check_sound(guest, {})
    guest.domain.resume()
    guest.probe.pattern(9, 0x200000, 65536)
    assert guest.guest_sees() == sums(guest.disks["sda"][0])
    create_snapshot(guest.conn, guest.name, "afterwards")
    guest.probe.pattern(10, 0x200000, 65536)


def spoil_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., object] = Monitor.execute

    def counted(self: Monitor, command: str, /, **arguments: object) -> object:
        answer = real(self, command, **arguments)
        if command == "query-blockstats":
            cast(Any, answer)[0]["stats"]["failed_wr_operations"] = 1
        return answer

    monkeypatch.setattr(Monitor, "execute", counted)


def age(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "can_exchange", lambda _: False)


def fill_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_free", lambda _: 4096)


def spoil_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, "blockdev-reopen", 1)


def spoil_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "here")

    monkeypatch.setattr(qemu_vmdk_snap, "merge_links", full)


REFUSALS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], type[Exception], str]] = {
    "failed writes": (spoil_writes, DomainError, "disk sda: writes of the guest have failed"),
    "QEMU 6.0": (age, NotWhileRunning, "QEMU cannot exchange .*; the delete is noted, and done once it is shut off"),
    "no space": (fill_up, DomainError, r"needs \d+ bytes for the images .*, and its file system has 4096 left$"),
    "reopen": (spoil_graph, DomainError, "so says the test"),
    "full": (spoil_image, OSError, "No space left"),
}


def test_refused_or_failed_it_is_as_before(guest: ChainGuest) -> None:
    create_snapshot(guest.conn, guest.name, "s1")
    guest.probe.pattern(1, 0x200000, 65536)
    before = state_of(guest)
    for kind, (spoil, error, text) in REFUSALS.items():
        with pytest.MonkeyPatch.context() as broken:
            spoil(broken)
            with pytest.raises(error, match=text):
                delete(guest.conn, guest.name, "off1")
        now = state_of(guest)
        assert (now[0], *now[2:]) == (before[0], *before[2:]), kind
        assert (now[1] == before[1]) is (kind != "QEMU 6.0"), kind
        assert IntentStore.of(guest.conn).uuids() == []
        guest.probe.pattern(2, 0x200000, 65536)
        before = state_of(guest)
    delete(guest.conn, guest.name, "off1")
    check_sound(guest, {"s1": list(both(frozen_files(guest)["s1"]).values())})
    assert waiting(guest.domain) == []


def test_what_must_wait_is_done_after_the_stop(
    guest: ChainGuest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = guest.conn.getURI()
    create_snapshot(guest.conn, guest.name, "s1")
    words = ["snapshot", "prune", "-c", uri, guest.name, "--keep-last=1"]
    with monkeypatch.context() as old:
        age(old)
        assert main(words) == 0
        assert "Domain snapshot off1 waits until the guest is shut off: " in capsys.readouterr().out
        assert main([*words, "--output=json"]) == 0
        assert [one["snapshot"] for one in check("snapshot prune", capsys.readouterr().out)["waiting"]] == ["off1"]
        assert waiting(guest.domain) == ["off1"]
    assert "urn:qemu-vmdk-snap:waiting:1" in guest.domain.XMLDesc(0)  # what the hook will be given
    policy = tmp_path / "policy.toml"
    policy.write_text(f'verify = "chain"\nconnect = "{uri}"\n')
    guest.domain.destroy()
    assert main(["hook", "after-stop", guest.name, "--policy", str(policy), "--output=json"]) == 0
    assert check("hook after-stop", capsys.readouterr().out)["deleted"] == ["off1"]
    assert (waiting(guest.domain), list(frozen_files(guest))) == ([], ["s1"])


def test_the_timer_keeps_a_running_guest_at_its_retention(guest: ChainGuest) -> None:
    with Writer(guest.probe) as writer:
        for number in range(PRUNES):
            create_snapshot(guest.conn, guest.name, f"s{number}")
            report = prune(guest.conn, guest.name, Retention(last=2))
            assert (report.failed, report.waiting) == ((), ())
            assert len(frozen_files(guest)) == 2
            assert len(guest.disks["sda"]) == 3
            writer.wait(1)
    assert len(list(guest.folder.glob("*.vmdk"))) == 3
    check_sound(guest, {name: list(both(files).values()) for name, files in frozen_files(guest).items()})


@pytest.mark.parametrize("way", ["delete", "consolidate"])
def test_a_large_link_is_not_copied_for_little(guest: ChainGuest, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """It waits in the chain until as much is above it, or until the domain is shut off and consolidated."""
    monkeypatch.setattr(live, "_CHEAP", 0)
    monkeypatch.setattr(live, "shares_extents", lambda _: False)
    base = guest.disks["sda"][-1]
    inode = base.stat().st_ino
    create_snapshot(guest.conn, guest.name, "s1")
    guest.probe.pattern(1, 0x200000, 524288)
    create_snapshot(guest.conn, guest.name, "s2")
    size = State.size
    monkeypatch.setattr(State, "size", lambda state, path: 1 << 40 if path == base else size(state, path))
    seen = guest.guest_sees()
    report = delete(guest.conn, guest.name, ["off1", "s1"])
    told = {one.name: one.work[0] for one in report.deleted}
    assert (told["off1"].mode, told["s1"].mode) == ("keep", "exchange")
    assert "is far larger than what would be merged with it" in told["off1"].lines()[0]
    assert (guest.disks["sda"][-1], base.stat().st_ino, len(guest.disks["sda"])) == (base, inode, 3)
    monkeypatch.undo()
    if way == "delete":
        delete(guest.conn, guest.name, "s2")
    else:
        guest.domain.destroy()
        assert [one.path for one in consolidate_domain(guest.conn, guest.name).merged] == [base]
    frozen = frozen_files(guest)
    assert (len(guest.disks["sda"]), list(frozen)) == (2, ["s2"] if way == "consolidate" else [])
    assert sums(guest.disks["sda"][0]) == seen
    check_sound(guest, {name: list(both(files).values()) for name, files in frozen.items()})


def test_a_branch_below_keeps_what_it_is_backed_by(guest: ChainGuest) -> None:
    """Another branch is backed by the base too: the guest's branch leaves it, and nothing is copied."""
    guest.domain.destroy()
    revert(guest.conn, guest.name, "off1")
    create_snapshot(guest.conn, guest.name, "b1")
    guest.probe.close()
    guest.start()
    create_snapshot(guest.conn, guest.name, "b2")
    guest.probe.pattern(3, 0x200000, 4096)
    left = guest.folder / "a-000001.vmdk"
    expected, kept = {name: list(both(files).values()) for name, files in frozen_files(guest).items()}, content(left)
    report = delete(guest.conn, guest.name, ["off1", "b1"])
    works = {one.name: [(work.mode, work.reason) for work in one.work] for one in report.deleted}
    assert works["off1"] == [("keep", f"{left} is backed by it too")]
    assert [mode for mode, _ in works["b1"]] == ["exchange"]
    found = frozen_files(guest)
    assert list(both(found["b2"]).values()) == expected["b2"]
    assert content(left) == kept
    assert guest.guest_sees() == sums(guest.disks["sda"][0])


def test_a_guest_that_ends_right_after_the_exchange(guest: ChainGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing on the disk tells of the exchange yet: the snapshot is as it was, and that is said."""
    create_snapshot(guest.conn, guest.name, "s1")
    guest.probe.pattern(1, 0x200000, 4096)
    expected = {name: list(both(files).values()) for name, files in frozen_files(guest).items()}
    real = steps.exchange_images

    def ending(*args: Any) -> object:  # noqa: ANN401
        report = real(*args)
        guest.domain.destroy()
        return report

    with monkeypatch.context() as patch:
        patch.setattr(steps, "exchange_images", ending)
        with pytest.raises(DomainError, match=r"its guest ended while snapshot 'off1' was deleted, which is as it was"):
            delete(guest.conn, guest.name, "off1")
    check_sound(guest, expected)
    delete(guest.conn, guest.name, "off1")
    assert {name: list(both(files).values()) for name, files in frozen_files(guest).items()} == {"s1": expected["s1"]}
