"""Deleting snapshots: everything else keeps its bytes, its XML and its place in the tree."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap import StillNeeded, open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.delete import run as delete_module
from qemu_vmdk_snap.domain.delete.run import delete
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.journal.recover import recover
from qemu_vmdk_snap.domain.registry import list_snapshots
from qemu_vmdk_snap.domain.revert.run import revert
from qemu_vmdk_snap.domain.xml import list_disks
from tests.domain.lab import Lab, contents, xml_of

if TYPE_CHECKING:
    import libvirt

pytestmark = pytest.mark.needs("libvirt", "qemu-system-x86_64")

GRAIN = 64 * 1024


def tops(domain: libvirt.virDomain) -> list[Path]:
    return [disk.path for disk in list_disks(xml_of(domain)) if disk.path is not None]


def write(domain: libvirt.virDomain, number: int, grains: int = 1) -> None:
    """Write something of its own at each disk's top, partly over what is below."""
    for path in tops(domain):
        with open_chain(path, writable=True) as chain:
            chain.write_at(number * GRAIN - 700, f"{path.name} at {number}".encode() * 20)
            chain.write_at(0, f"now {number}".encode())
            chain.write_at(20 * GRAIN, bytes([number]) * GRAIN * grains)


def seen(lab: Lab, domain: libvirt.virDomain) -> dict[str, list[bytes]]:
    """Return every byte of every disk, of the domain and of its snapshots."""
    found: dict[str, list[bytes]] = {}
    for info in list_snapshots(lab.conn, domain.name()):
        assert [disk.problem for disk in info.disks] == [None, None][: len(info.disks)]
        found[info.name] = [read(disk.frozen) for disk in info.disks if disk.frozen is not None]
    found["now"] = [read(path) for path in tops(domain)]
    return found


def read(path: Path) -> bytes:
    with open_chain(path) as chain:
        return chain.read_at(0, chain.capacity)


def chain_in_xml_fits(domain: libvirt.virDomain) -> None:
    for disk in list_disks(xml_of(domain)):
        assert disk.path is not None
        with open_chain(disk.path) as chain:
            assert [link.path for link in chain.links] == [disk.path, *disk.backing]


@pytest.fixture
def domain(lab: Lab) -> libvirt.virDomain:
    """Return a domain with the tree s1 - (s2 - s3, s4 - now), and a top that nobody has on s3."""
    domain = lab.define(lab.disk("a"), lab.disk("b"))
    for number in (1, 2, 3):
        write(domain, number, grains=4 - number)
        create_snapshot(lab.conn, domain.name(), f"s{number}")
    write(domain, 4)
    revert(lab.conn, domain.name(), "s1")
    write(domain, 5)
    create_snapshot(lab.conn, domain.name(), "s4")
    write(domain, 6)
    return domain


@pytest.mark.parametrize("name", ["s1", "s2", "s3", "s4"])
def test_any_of_the_tree(lab: Lab, domain: libvirt.virDomain, name: str) -> None:
    before, parents = seen(lab, domain), {i.name: i.parent for i in list_snapshots(lab.conn, domain.name())}
    report = delete(lab.conn, domain.name(), name)
    assert [one.name for one in report.deleted] == [name]
    del before[name]
    assert seen(lab, domain) == before
    chain_in_xml_fits(domain)
    for info in list_snapshots(lab.conn, domain.name()):
        assert info.parent == (parents[name] if parents[info.name] == name else parents[info.name])
    for work in report.deleted[0].work:
        assert work.removed is not None
        assert not work.removed.exists()
    assert domain.snapshotCurrent().getName() == ("s1" if name == "s4" else "s4")
    assert IntentStore.of(lab.conn).uuids() == []
    domain.create()
    domain.destroy()


@pytest.mark.parametrize("order", list(itertools.permutations(["s1", "s2", "s3", "s4"]))[::5])
def test_all_of_them_in_any_order(lab: Lab, domain: libvirt.virDomain, order: tuple[str, ...]) -> None:
    before = seen(lab, domain)
    orphan = read(lab.folder / "a-000003.vmdk")
    for name in order:
        delete(lab.conn, domain.name(), name)
        del before[name]
        assert seen(lab, domain) == before
        chain_in_xml_fits(domain)
    assert read(lab.folder / "a-000003.vmdk") == orphan  # what a revert kept is kept here too
    domain.create()
    domain.destroy()


def test_with_its_children(lab: Lab, domain: libvirt.virDomain) -> None:
    before = seen(lab, domain)["now"]
    report = delete(lab.conn, domain.name(), "s1", scope="children-only")
    assert sorted(one.name for one in report.deleted) == ["s2", "s3", "s4"]
    report = delete(lab.conn, domain.name(), "s1", scope="children")
    assert [one.name for one in report.deleted] == ["s1"]
    assert domain.snapshotNum() == 0
    assert seen(lab, domain) == {"now": before}


def test_the_base_stays_where_it_is(lab: Lab) -> None:
    """Of a simple chain the data goes down into the base, which keeps its name."""
    domain = lab.define(lab.disk("a"))
    create_snapshot(lab.conn, domain.name(), "s1")
    write(domain, 1)
    expected = read(lab.folder / "a-000001.vmdk")
    delete(lab.conn, domain.name(), "s1")
    assert tops(domain) == [lab.folder / "a.vmdk"]
    assert [path.name for path in lab.folder.glob("*.vmdk")] == ["a.vmdk"]
    assert read(lab.folder / "a.vmdk") == expected


def test_metadata_alone(lab: Lab, domain: libvirt.virDomain) -> None:
    before, held = (contents(lab.folder), xml_of(domain)), seen(lab, domain)
    delete(lab.conn, domain.name(), "s2", metadata=True)
    assert (contents(lab.folder), xml_of(domain)) == before
    del held["s2"]
    assert seen(lab, domain) == held
    assert {i.name: i.parent for i in list_snapshots(lab.conn, domain.name())} == {"s1": None, "s3": "s1", "s4": "s1"}


@pytest.mark.parametrize("name", ["s1", "s2", "s3", "s4"])
def test_any_of_the_tree_while_the_guest_runs(lab: Lab, domain: libvirt.virDomain, name: str) -> None:
    """Of the guest's own branch and of the other one; the shared base stays for as long as both need it."""
    before, parents = seen(lab, domain), {i.name: i.parent for i in list_snapshots(lab.conn, domain.name())}
    domain.create()
    report = delete(lab.conn, domain.name(), name)
    assert domain.isActive()
    domain.destroy()
    del before[name]
    assert seen(lab, domain) == before
    chain_in_xml_fits(domain)
    for info in list_snapshots(lab.conn, domain.name()):
        assert info.parent == (parents[name] if parents[info.name] == name else parents[info.name])
    modes = {"s1": "keep", "s2": "merge", "s3": "copy", "s4": "exchange"}
    assert [work.mode for work in report.deleted[0].work] == [modes[name]] * 2
    assert not list(lab.folder.glob(".*"))
    domain.create()
    domain.destroy()


def test_what_another_domain_uses_is_kept(lab: Lab, domain: libvirt.virDomain) -> None:
    other = lab.define(lab.folder / "a-000001.vmdk")
    before = contents(lab.folder)
    with pytest.raises(
        StillNeeded, match=rf"a-000001\.vmdk: is still needed: domain {other.name()} has it as its disk"
    ):
        delete(lab.conn, domain.name(), "s2")
    assert contents(lab.folder) == before


def test_the_command(lab: Lab, domain: libvirt.virDomain, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["snapshot", "delete", "-c", lab.uri, domain.name()]
    assert main([*words, "s2", "--metadata"]) == 0
    assert capsys.readouterr().out == "Domain snapshot s2 deleted\n"
    assert main([*words, "--current", "--output=json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [(one["snapshot"], len(one["disks"])) for one in answer["deleted"]] == [("s4", 2)]
    assert main(words) != 0


# A death at each step, and in each operation on the images.

STEPS = {
    "record": ("write", 1),
    "first merge or move": ("engine", 1),
    "second merge or move": ("engine", 2),
    "third merge or move": ("engine", 3),
    "lock": ("_hold", 1),
    "locks": ("_hold", 2),
    "xml": ("_change_xml", 1),
}


@pytest.mark.parametrize("name", ["s1", "s2", "s3", "s4"])
@pytest.mark.parametrize("step", STEPS)
def test_a_death_is_settled(
    lab: Lab, domain: libvirt.virDomain, monkeypatch: pytest.MonkeyPatch, step: str, name: str
) -> None:
    before = seen(lab, domain)
    what, at = STEPS[step]
    calls = itertools.count(1)
    died = False

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def dies(*args: object, **options: object) -> object:
            nonlocal died
            result = real(*args, **options)
            if next(calls) == at:
                died = True
                raise KeyboardInterrupt
            return result

        return dies

    with monkeypatch.context() as patch:
        from qemu_vmdk_snap.ops.edit import commit, rebase

        homes: dict[str, list[tuple[object, str]]]
        homes = {"write": [(IntentStore, "write")], "engine": [(commit, "commit"), (rebase, "rebase")]}
        for home, function in homes.get(what, [(delete_module, what)]):
            patch.setattr(home, function, dying(getattr(home, function)))
        patch.setattr(IntentStore, "remove", lambda *_: None)
        with contextlib.suppress(KeyboardInterrupt):
            delete(lab.conn, domain.name(), name)
    results = recover(lab.conn)
    assert [(result.operation, result.finished) for result in results] == [("delete", True)]
    assert died or what == "engine"
    del before[name]
    assert seen(lab, domain) == before
    chain_in_xml_fits(domain)
    assert not list(lab.folder.glob(".*"))
    domain.create()
    domain.destroy()
