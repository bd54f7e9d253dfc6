"""Going back to a snapshot, and what becomes of the way there."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap import DomainError, open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.journal.recover import recover
from qemu_vmdk_snap.domain.registry import list_snapshots
from qemu_vmdk_snap.domain.revert import run as revert_module
from qemu_vmdk_snap.domain.revert.run import revert
from qemu_vmdk_snap.domain.xml import list_disks
from tests.domain.lab import Lab, contents, xml_of

if TYPE_CHECKING:
    import libvirt

pytestmark = pytest.mark.needs("libvirt", "qemu-system-x86_64")


def write(lab: Lab, name: str, text: bytes) -> None:
    with open_chain(lab.folder / name, writable=True) as chain:
        chain.write_at(0, text)


def read(lab: Lab, name: str) -> bytes:
    with open_chain(lab.folder / name) as chain:
        return chain.read_at(0, 5)


@pytest.fixture
def domain(lab: Lab) -> libvirt.virDomain:
    """Return a domain of two disks whose first one said `at s1`, then `at s2`, then `later`."""
    domain = lab.define(lab.disk("a"), lab.disk("b"))
    write(lab, "a.vmdk", b"at s1")
    create_snapshot(lab.conn, domain.name(), "s1")
    write(lab, "a-000001.vmdk", b"at s2")
    create_snapshot(lab.conn, domain.name(), "s2")
    write(lab, "a-000002.vmdk", b"later")
    return domain


def top(domain: libvirt.virDomain) -> str:
    path = list_disks(xml_of(domain))[0].path
    assert path is not None
    return path.name


def test_back_and_all_else_is_kept(lab: Lab, domain: libvirt.virDomain) -> None:
    before = contents(lab.folder)
    report = revert(lab.conn, domain.name(), "s1")
    assert (top(domain), read(lab, top(domain))) == ("a-000003.vmdk", b"at s1")
    assert report.kept == (lab.folder / "a-000002.vmdk", lab.folder / "b-000002.vmdk")
    assert {path: contents(lab.folder)[path] for path in before} == before
    assert domain.snapshotCurrent().getName() == "s1"
    # Another branch grows from here, and the old one can still be gone back to.
    create_snapshot(lab.conn, domain.name(), "s3")
    assert [(info.name, info.parent) for info in list_snapshots(lab.conn, domain.name())] == [
        ("s1", None),
        ("s2", "s1"),
        ("s3", "s1"),
    ]
    revert(lab.conn, domain.name(), "s2")
    assert read(lab, top(domain)) == b"at s2"
    domain.create()


def test_discard_unlinks_what_no_snapshot_has(lab: Lab, domain: libvirt.virDomain) -> None:
    report = revert(lab.conn, domain.name(), "s2", discard=True)
    assert report.discarded == (lab.folder / "a-000002.vmdk", lab.folder / "b-000002.vmdk")
    assert not (lab.folder / "a-000002.vmdk").exists()
    assert read(lab, top(domain)) == b"at s2"
    revert(lab.conn, domain.name(), "s1", discard=True)
    assert sorted(path.name for path in lab.folder.glob("a*.vmdk")) == ["a-000001.vmdk", "a-000004.vmdk", "a.vmdk"]
    assert read(lab, "a-000001.vmdk") == b"at s2"


def test_discard_keeps_what_another_image_stands_on(lab: Lab, domain: libvirt.virDomain) -> None:
    from qemu_vmdk_snap import create_overlay

    create_overlay(lab.folder / "other.vmdk", lab.folder / "a-000002.vmdk")
    report = revert(lab.conn, domain.name(), "s2", discard=True)
    assert (report.kept, report.discarded) == (
        (lab.folder / "a-000002.vmdk",),
        (lab.folder / "b-000002.vmdk",),
    )
    assert read(lab, "other.vmdk") == b"later"


def test_the_domain_is_what_it_was(lab: Lab, domain: libvirt.virDomain) -> None:
    lab.conn.defineXML(xml_of(domain).replace("<memory unit='KiB'>32768", "<memory unit='KiB'>65536"))
    revert(lab.conn, domain.name(), "s1")
    assert "<memory unit='KiB'>32768" in xml_of(domain)
    assert "passwd='secret'" in xml_of(domain)


@pytest.mark.parametrize(
    ("after", "state"), [("running", "running"), ("paused", "paused"), ("shutoff", "shutoff"), ("as-saved", "shutoff")]
)
def test_a_running_guest_is_ended_and_left_as_wanted(
    lab: Lab, domain: libvirt.virDomain, after: revert_module.After, state: str
) -> None:
    import libvirt

    domain.create()
    report = revert(lab.conn, domain.name(), "s1", after=after, discard=True)
    states = {libvirt.VIR_DOMAIN_RUNNING: "running", libvirt.VIR_DOMAIN_PAUSED: "paused"}
    assert (states.get(domain.state()[0], "shutoff"), report.state) == (state, state)
    if domain.isActive():
        domain.destroy()
    assert read(lab, top(domain)) == b"at s1"
    assert not (lab.folder / "a-000002.vmdk").exists()


def test_what_cannot_be_gone_back_to(lab: Lab, domain: libvirt.virDomain) -> None:
    import libvirt

    before = (xml_of(domain), contents(lab.folder))
    with pytest.raises(DomainError, match="has no snapshot 'nobody'"):
        revert(lab.conn, domain.name(), "nobody")
    text = domain.snapshotLookupByName("s2").getXMLDesc(0).replace("<name>s2<", "<name>m<", 1)
    text = text.replace("<memory snapshot='no'/>", "<memory snapshot='external' file='/nowhere'/>")
    text = text.replace("<state>shutoff<", "<state>running<", 1)
    domain.snapshotCreateXML(text, libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE)
    with pytest.raises(DomainError, match="/nowhere, which has its memory, is not there"):
        revert(lab.conn, domain.name(), "m")
    assert (xml_of(domain), contents(lab.folder)) == before


def test_the_command(lab: Lab, domain: libvirt.virDomain, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["snapshot", "revert", "-c", lab.uri, domain.name()]
    assert main([*words, "s1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"Domain {domain.name()} reverted to snapshot s1, shutoff",
        f"  vda: {lab.folder}/a-000003.vmdk, backed by {lab.folder}/a.vmdk (chain of 2)",
        f"  vdb: {lab.folder}/b-000003.vmdk, backed by {lab.folder}/b.vmdk (chain of 2)",
        f"  kept: {lab.folder}/a-000002.vmdk: belongs to no snapshot",
        f"  kept: {lab.folder}/b-000002.vmdk: belongs to no snapshot",
    ]
    assert main([*words, "--current", "--discard", "--output=json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["snapshot"], answer["discarded"]) == ("s1", [f"{lab.folder}/{d}-000003.vmdk" for d in "ab"])
    assert main([*words]) != 0


# A failure, and a death, at each step.

STEPS: dict[str, tuple[str, int, bool]] = {
    "record": ("write", 1, True),
    "first overlay": ("make_overlay", 1, False),
    "second overlay": ("make_overlay", 2, False),
    "second record": ("write", 2, True),
    "edit": ("_refuse_edited", 1, False),
    "definition": ("make_current", 1, False),
    "current": ("make_current", 1, True),
}


def break_step(monkeypatch: pytest.MonkeyPatch, step: str, failure: Callable[[], BaseException]) -> None:
    name, at, works = STEPS[step]
    home: ModuleType | type = IntentStore if name == "write" else revert_module
    real: Callable[..., object] = getattr(home, name)
    calls = itertools.count(1)

    def broken(*args: object, **options: object) -> object:
        fails = next(calls) == at
        result = real(*args, **options) if works or not fails else None
        if fails:
            raise failure()
        return result

    monkeypatch.setattr(home, name, broken)


def state_of(lab: Lab, domain: libvirt.virDomain) -> tuple[object, ...]:
    return xml_of(domain), contents(lab.folder), domain.snapshotCurrent().getName(), IntentStore.of(lab.conn).uuids()


@pytest.mark.parametrize("step", STEPS)
def test_a_failure_takes_everything_back(
    lab: Lab, domain: libvirt.virDomain, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = state_of(lab, domain)
    with monkeypatch.context() as broken:
        break_step(broken, step, lambda: DomainError("test", "so says the test"))
        with pytest.raises(DomainError, match=r"^domain test: so says the test$"):
            revert(lab.conn, domain.name(), "s1", discard=True)
    assert state_of(lab, domain) == before
    revert(lab.conn, domain.name(), "s1", discard=True)
    assert read(lab, top(domain)) == b"at s1"


@pytest.mark.parametrize("step", STEPS)
def test_a_death_is_settled(lab: Lab, domain: libvirt.virDomain, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    before = state_of(lab, domain)
    with monkeypatch.context() as dying:
        break_step(dying, step, KeyboardInterrupt)
        dying.setattr(revert_module, "_undo", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            revert(lab.conn, domain.name(), "s1", discard=True)
    (result,) = recover(lab.conn)
    assert (result.operation, result.finished, result.left) == ("revert", step in ("definition", "current"), ())
    if not result.finished:
        assert state_of(lab, domain) == before
        return
    assert read(lab, top(domain)) == b"at s1"
    assert domain.snapshotCurrent().getName() == "s1"
    assert not (lab.folder / "a-000002.vmdk").exists()
