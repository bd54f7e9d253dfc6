"""Moving a domain's files: each byte, each snapshot and each link is there as before, in another folder."""

from __future__ import annotations

import errno
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import qemu_vmdk_snap
from qemu_vmdk_snap import DomainError, InvalidRequest, StillNeeded, create_image, open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain import clone_domain, move_domain
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.delete.run import delete
from qemu_vmdk_snap.domain.doctor.domain import check_domain
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.journal.recover import recover
from qemu_vmdk_snap.domain.move import run as move_module
from qemu_vmdk_snap.domain.registry import list_snapshots
from qemu_vmdk_snap.domain.revert.run import revert
from qemu_vmdk_snap.domain.xml.kept import kept_branches
from tests.domain.delete.test_delete import chain_in_xml_fits, read, seen, tops, write
from tests.domain.lab import MIB, Lab, contents, xml_of
from tests.support.schemas import check

if TYPE_CHECKING:
    import libvirt

EACH = bool(os.environ.get("VMDK_KILL_EACH"))
"""Die after each step, not after some of them: copies are waited for until they are on the disk."""

pytestmark = pytest.mark.needs("libvirt", "qemu-system-x86_64")


@pytest.fixture
def domain(lab: Lab) -> libvirt.virDomain:
    """Return a domain of a sparse disk and a split one, whose overlays are in two folders, with a kept branch."""
    split = lab.folder / "b.vmdk"
    create_image(split, 2 * MIB, kind="twoGbMaxExtentSparse", durable=False)
    domain = lab.define(lab.disk("a", size=2 * MIB), split)
    (lab.folder / "second").mkdir()
    write(domain, 1)
    create_snapshot(lab.conn, domain.name(), "s1")
    write(domain, 2)
    elsewhere = {"vda": lab.folder / "second" / "a-top.vmdk"}
    create_snapshot(lab.conn, domain.name(), "s2", overlays=elsewhere)
    with open_chain(elsewhere["vda"], writable=True, trusted_dirs=[lab.folder]) as chain:
        chain.write_at(MIB, b"kept")
    revert(lab.conn, domain.name(), "s1")
    write(domain, 4)
    return domain


@pytest.fixture
def target(lab: Lab) -> Path:
    folder = lab.folder / "new"
    folder.mkdir()
    return folder


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """Return a folder on another file system."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def images(*folders: Path) -> list[str]:
    return sorted(path.name for folder in folders for path in folder.rglob("*.vmdk"))


def is_whole(lab: Lab, domain: libvirt.virDomain, held: dict[str, list[bytes]]) -> None:
    assert seen(lab, domain) == held
    chain_in_xml_fits(domain)
    assert IntentStore.of(lab.conn).uuids() == []
    assert [c for c in check_domain(lab.conn, domain.name()) if c.verdict == "bad"] == []


@pytest.mark.parametrize("other", [False, True], ids=["same file system", "another"])
def test_the_whole_tree(lab: Lab, domain: libvirt.virDomain, target: Path, elsewhere: Path, other: bool) -> None:
    held, there = seen(lab, domain), images(lab.folder)
    files = contents(lab.folder)
    where = elsewhere if other else target
    assert (where.stat().st_dev != lab.folder.stat().st_dev) is other
    plan = move_domain(lab.conn, domain.name(), where, dry_run=True)
    assert (contents(lab.folder), plan.changed) == (files, False)
    report = move_domain(lab.conn, domain.name(), where)
    assert report.files == plan.files
    assert {file.mode for file in report.files} == {"copy" if other else "rename"}
    assert images(where) == there
    assert images(lab.folder) == ([] if other else there)
    assert not [*lab.folder.rglob(".*"), *where.rglob(".*")]
    is_whole(lab, domain, held)
    assert [path.parent for path in tops(domain)] == [where, where]
    for info in list_snapshots(lab.conn, domain.name()):
        assert {disk.frozen.parent for disk in info.disks if disk.frozen is not None} == {where}
    assert {path.parent for path in kept_branches(xml_of(domain))} == {where}
    for path in where.glob("*.vmdk"):
        if "-s0" not in path.name:
            with open_chain(path):  # each hint leads to a parent in the new folder: no other one is allowed
                pass
    assert not move_domain(lab.conn, domain.name(), where).changed
    domain.create()
    domain.destroy()
    for name in ("s2", "s1"):
        delete(lab.conn, domain.name(), name)
        del held[name]
        assert seen(lab, domain) == held


def test_a_clone_leaves_its_base_where_it_is(lab: Lab, domain: libvirt.virDomain, target: Path) -> None:
    clone_domain(lab.conn, domain.name(), "s1", "test")
    lab.adopt("test")
    made = lab.conn.lookupByName("test")
    create_snapshot(lab.conn, "test", "own")
    held = [read(path) for path in tops(made)]
    with pytest.raises(StillNeeded, match=r"a.vmdk: is still needed: domain test has it below its disk vda"):
        move_domain(lab.conn, domain.name(), target)
    report = move_domain(lab.conn, "test", target)
    assert {path.name for path, _ in report.kept} == {"a.vmdk", "b.vmdk"}
    assert images(target) == sorted(file.path.name for file in report.files)
    with open_chain(tops(made)[0], trusted_dirs=[lab.folder]) as chain:
        assert [link.path.parent.name for link in chain.links] == ["new", "new", lab.folder.name]
    found = []
    for path in tops(made):
        with open_chain(path, trusted_dirs=[lab.folder]) as chain:
            found.append(chain.read_at(0, chain.capacity))
    assert found == held
    made.create()
    made.destroy()


def test_what_is_refused_changes_nothing(lab: Lab, domain: libvirt.virDomain, target: Path) -> None:
    (target / "a.vmdk").write_bytes(b"mine")
    before = (contents(lab.folder), xml_of(domain))
    with pytest.raises(DomainError, match=r"new/a.vmdk exists already"):
        move_domain(lab.conn, domain.name(), target)
    with pytest.raises(InvalidRequest, match=r"none: is no folder"):
        move_domain(lab.conn, domain.name(), lab.folder / "none")
    twin = lab.define(lab.disk("c"), lab.disk("c", folder=lab.folder / "second"))
    with pytest.raises(DomainError, match=r"c.vmdk and .*second/c.vmdk would have one name in "):
        move_domain(lab.conn, twin.name(), target)
    domain.create()
    with pytest.raises(DomainError, match=r"runs: shut it off first"):
        move_domain(lab.conn, domain.name(), target)
    domain.destroy()
    for name in ("c.vmdk", "second/c.vmdk"):
        (lab.folder / name).unlink()
    assert (contents(lab.folder), xml_of(domain)) == before
    assert IntentStore.of(lab.conn).uuids() == []


@pytest.mark.parametrize("copies", [False, True], ids=["names", "copies"])
def test_interrupted_after_each_step(
    lab: Lab, domain: libvirt.virDomain, target: Path, monkeypatch: pytest.MonkeyPatch, copies: bool
) -> None:
    """A command that dies between two steps is finished, or taken back, by the next one; no byte is lost."""
    held, there = seen(lab, domain), images(lab.folder)
    outcomes = set()
    back = lab.folder / "back"
    back.mkdir()
    for at in itertools.count(1, 1 if EACH else 7 if copies else 2):
        with monkeypatch.context() as dying:
            steps = watch(dying, at, copies=copies)
            try:
                move_domain(lab.conn, domain.name(), target)
            except Died:
                pass
            else:
                break
        assert steps[0] == at
        with monkeypatch.context() as plain:
            if copies:
                plain.setattr(Path, "hardlink_to", between_file_systems(Path.hardlink_to))
            found = recover(lab.conn, [domain.name()])
        assert IntentStore.of(lab.conn).uuids() == []
        outcomes |= {(one.operation, one.finished) for one in found}
        assert [one.left for one in found if one.left] == []
        assert images(lab.folder) == there
        is_whole(lab, domain, held)
        moved = tops(domain)[0].parent == target
        assert len(images(target)) == (len(there) if moved else 0)
        if moved:
            move_domain(lab.conn, domain.name(), back)
    assert at > 25
    assert outcomes == {("move", True), ("move", False)}
    is_whole(lab, domain, held)


class Died(BaseException):
    """The process is gone: nothing cleans up after it."""


def watch(dying: pytest.MonkeyPatch, at: int, *, copies: bool) -> list[int]:
    """Let the command die after its step `at`; return how many it has done."""
    steps = [0]

    def counted(home: object, name: str) -> None:
        real = getattr(home, name)

        def dies(*words: object, **options: object) -> object:
            if steps[0] >= at:
                raise Died
            result = real(*words, **options)
            steps[0] += 1
            if steps[0] == at:
                raise Died
            return result

        dying.setattr(home, name, dies)

    import libvirt

    if copies:
        dying.setattr(Path, "hardlink_to", between_file_systems(Path.hardlink_to))
    for name in ("write", "remove"):
        counted(IntentStore, name)
    for name in ("copy_file", "rebase"):
        counted(qemu_vmdk_snap, name)
    counted(libvirt.virConnect, "defineXML")
    counted(libvirt.virDomain, "snapshotCreateXML")
    for name in ("unlink", "rmdir", "mkdir", "hardlink_to"):
        counted(Path, name)
    for name in ("_settle_now",):
        dying.setattr(move_module, name, lambda *_: None)
    return steps


def between_file_systems(real: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    """Return a hard link that only a file in its staging folder gets."""

    def link(path: Path, source: Path) -> None:
        if not source.parent.name.startswith("."):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(path, source)

    return link


def test_the_command(
    lab: Lab,
    domain: libvirt.virDomain,
    target: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(lab.folder)
    line = ["snapshot", "move", "-c", lab.uri, domain.name(), "new"]
    assert main([*line, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(f"Domain {domain.name()} would be moved to {target}\n")
    assert main([*line, "--output=json"]) == 0
    answer = check("snapshot move", capsys.readouterr().out)
    assert {Path(file["filename"]).parent for file in answer["files"]} == {target}
    assert main(line) == 0
    assert capsys.readouterr().out == f"Nothing to move: the files of domain {domain.name()} are in {target}\n"
