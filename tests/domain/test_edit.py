"""Names, descriptions and the current snapshot: libvirt's metadata changes, nothing else."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap import DomainError, InvalidRequest
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain import edit
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.edit import describe, rename, set_current
from qemu_vmdk_snap.domain.journal.recover import recover
from qemu_vmdk_snap.domain.registry import list_snapshots, snapshot_info
from tests.domain.lab import Lab, contents, xml_of

if TYPE_CHECKING:
    import libvirt

pytestmark = pytest.mark.needs("libvirt", "qemu-system-x86_64")


@pytest.fixture
def domain(lab: Lab) -> libvirt.virDomain:
    domain = lab.define(lab.disk("a"))
    for name in ("s1", "s2", "s3"):
        create_snapshot(lab.conn, domain.name(), name, f"the description of {name}")
    return domain


def registry(lab: Lab, domain: libvirt.virDomain) -> dict[str, tuple[object, ...]]:
    infos = list_snapshots(lab.conn, domain.name())
    return {one.name: (one.parent, one.current, one.creation_time, one.description, one.disks) for one in infos}


def state(lab: Lab, domain: libvirt.virDomain) -> tuple[object, ...]:
    return registry(lab, domain), xml_of(domain), contents(lab.folder)


@pytest.mark.parametrize("old", ["s1", "s2", "s3"])
def test_a_new_name_and_all_else_as_it_was(lab: Lab, domain: libvirt.virDomain, old: str) -> None:
    before, files = registry(lab, domain), contents(lab.folder)
    rename(lab.conn, domain.name(), old, "<new> & shiny")
    renamed = {"<new> & shiny" if name == old else name: entry for name, entry in before.items()}
    expected = {
        name: ("<new> & shiny" if parent == old else parent, *rest) for name, (parent, *rest) in renamed.items()
    }
    assert registry(lab, domain) == expected
    assert contents(lab.folder) == files


def test_names_that_cannot_be(lab: Lab, domain: libvirt.virDomain) -> None:
    before = state(lab, domain)
    with pytest.raises(DomainError, match="has a snapshot 's2' already"):
        rename(lab.conn, domain.name(), "s1", "s2")
    with pytest.raises(InvalidRequest, match="must not contain '/'"):
        rename(lab.conn, domain.name(), "s1", "a/b")
    with pytest.raises(DomainError, match="has no snapshot 'x'"):
        rename(lab.conn, domain.name(), "x", "y")
    assert state(lab, domain) == before


@pytest.mark.parametrize("at", range(1, 5))
def test_a_death_in_a_rename_is_settled(
    lab: Lab, domain: libvirt.virDomain, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    before = registry(lab, domain)
    calls = itertools.count(1)
    with monkeypatch.context() as dying:
        for name in ("_redefine", "_forget"):
            real = getattr(edit, name)

            def dies(*args: object, _real: object = real, **options: object) -> None:
                assert callable(_real)
                _real(*args, **options)
                if next(calls) == at:
                    raise KeyboardInterrupt

            dying.setattr(edit, name, dies)
        with pytest.raises(KeyboardInterrupt):
            rename(lab.conn, domain.name(), "s1", "new")
    (result,) = recover(lab.conn)
    assert (result.operation, result.finished) == ("rename", True)
    expected = {"new": before["s1"], "s2": ("new", *before["s2"][1:]), "s3": before["s3"]}
    assert registry(lab, domain) == expected


def test_descriptions_come_and_go(lab: Lab, domain: libvirt.virDomain) -> None:
    before = registry(lab, domain)
    describe(lab.conn, domain.name(), "s2", "a < b & c")
    assert snapshot_info(lab.conn, domain.name(), "s2").description == "a < b & c"
    describe(lab.conn, domain.name(), "s2", None)
    assert snapshot_info(lab.conn, domain.name(), "s2").description is None
    describe(lab.conn, domain.name(), "s2", "the description of s2")
    assert registry(lab, domain) == before


def test_the_current_one(lab: Lab, domain: libvirt.virDomain) -> None:
    set_current(lab.conn, domain.name(), "s1")
    assert snapshot_info(lab.conn, domain.name()).name == "s1"


def test_the_commands(lab: Lab, domain: libvirt.virDomain, capsys: pytest.CaptureFixture[str]) -> None:
    def out(*words: str) -> str:
        assert main(["snapshot", words[0], "-c", lab.uri, domain.name(), *words[1:]]) == 0
        return capsys.readouterr().out

    assert out("current") == "s3\n"
    assert out("current", "s2") == "s2\n"
    assert out("rename", "s2", "two") == "Domain snapshot s2 renamed to two\n"
    assert out("current", "--name") == "two\n"
    assert out("describe", "two", "text") == "Description of domain snapshot two changed\n"
    sizes = out("list", "--sizes").splitlines()
    assert sizes[0].split()[-2:] == ["Frozen", "Depth"]
    assert [line.split()[-1] for line in sizes[2:]] == ["1", "2", "3"]  # by time
    assert main(["recover", "-c", lab.uri]) == 0
    assert capsys.readouterr().out == "Nothing to recover.\n"
