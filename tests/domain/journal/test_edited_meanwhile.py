"""An administrator edits the domain, or its snapshots, between a command's death and its recovery: the edit stays."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qemu_vmdk_snap import DomainError
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain import edit
from qemu_vmdk_snap.domain.create import run as create_run
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.delete import run as delete_run
from qemu_vmdk_snap.domain.journal.pending import abandon
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.journal.recover import recover
from qemu_vmdk_snap.domain.registry import list_snapshots
from qemu_vmdk_snap.domain.revert import run as revert_run
from tests.domain.lab import Lab, contents, xml_of

if TYPE_CHECKING:
    import libvirt

pytestmark = pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64")

NOTE = "edited by hand"


def virsh(lab: Lab, *words: str, editor: str | None = None) -> str:
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", **({"EDITOR": editor} if editor else {})}
    done = subprocess.run(
        ["virsh", "-c", lab.uri, *words], env=environ, check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def edit_domain(lab: Lab, domain: libvirt.virDomain) -> None:
    """Change the description, the memory, and how the first disk caches."""
    virsh(lab, "desc", domain.name(), "--config", NOTE)
    virsh(lab, "setmem", domain.name(), "24M", "--config")
    virsh(lab, "edit", domain.name(), editor="sed -i \"0,/type='vmdk'/s//type='vmdk' cache='writeback'/\"")


def check_edit(domain: libvirt.virDomain) -> None:
    text = xml_of(domain)
    assert f"<description>{NOTE}</description>" in text
    assert "<currentMemory unit='KiB'>24576</currentMemory>" in text
    assert text.count("cache='writeback'") == 1


def unedited(text: str) -> str:
    """Return the XML as it was before `edit_domain`."""
    text = re.sub(r"  <description>.*</description>\n", "", text)
    return text.replace("<currentMemory unit='KiB'>24576", "<currentMemory unit='KiB'>32768").replace(
        " cache='writeback'", ""
    )


def edit_snapshot(lab: Lab, domain: libvirt.virDomain, name: str) -> None:
    description = f"<description>{NOTE}</description>"
    editor = f"sed -i 's|<name>{name}</name>|&{description}|'"
    virsh(lab, "snapshot-edit", domain.name(), name, editor=editor)


def dies(*_: object, **__: object) -> Any:  # noqa: ANN401
    raise KeyboardInterrupt


def killed(
    monkeypatch: pytest.MonkeyPatch, module: object, step: str, work: Callable[[], object], *, after: bool = False
) -> None:
    """Leave the work as a process leaves it that dies at a step, or right after it."""
    real = getattr(module, step)

    def last(*args: object, **options: object) -> None:
        if after:
            real(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(module, step, last)
        for home in (create_run, revert_run):
            dying.setattr(home, "_undo", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            work()


def three_snapshots(lab: Lab) -> libvirt.virDomain:
    domain = lab.define(lab.disk("a"), lab.disk("b"))
    for name in ("s1", "s2", "s3"):
        create_snapshot(lab.conn, domain.name(), name)
    return domain


@pytest.mark.parametrize(("step", "finished"), [("make_overlay", False), ("_define", False), ("register", True)])
def test_create(daemon_lab: Lab, monkeypatch: pytest.MonkeyPatch, step: str, finished: bool) -> None:
    domain = three_snapshots(daemon_lab)
    killed(monkeypatch, create_run, step, lambda: create_snapshot(daemon_lab.conn, domain.name(), "s4"))
    edit_domain(daemon_lab, domain)
    edited = xml_of(domain)
    assert [one.finished for one in recover(daemon_lab.conn)] == [finished]
    assert xml_of(domain) == edited
    check_edit(domain)


def test_a_create_that_fails_takes_its_disks_back_and_no_edit(daemon_lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = three_snapshots(daemon_lab)
    before = xml_of(domain)

    def edits(*_: object) -> None:
        edit_domain(daemon_lab, domain)
        raise DomainError("d", "no")

    with monkeypatch.context() as failing:
        failing.setattr(create_run, "register", edits)
        with pytest.raises(DomainError, match="domain d: no"):
            create_snapshot(daemon_lab.conn, domain.name(), "s4")
    check_edit(domain)
    assert unedited(xml_of(domain)) == before
    assert not IntentStore.of(daemon_lab.conn).has(domain.UUIDString())
    assert not list(daemon_lab.folder.glob("*-000004.vmdk"))


def test_a_live_create_that_qemu_never_heard_of(daemon_lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = three_snapshots(daemon_lab)
    before = xml_of(domain)
    domain.create()
    killed(monkeypatch, create_run, "switch_all", lambda: create_snapshot(daemon_lab.conn, domain.name(), "s4"))
    edit_domain(daemon_lab, domain)
    assert [one.finished for one in recover(daemon_lab.conn)] == [False]
    check_edit(domain)
    assert unedited(xml_of(domain)) == before
    assert [info.name for info in list_snapshots(daemon_lab.conn, domain.name())] == ["s1", "s2", "s3"]


@pytest.mark.parametrize(("step", "finished"), [("make_overlay", False), ("make_current", True)])
def test_revert(daemon_lab: Lab, monkeypatch: pytest.MonkeyPatch, step: str, finished: bool) -> None:
    domain = three_snapshots(daemon_lab)
    killed(monkeypatch, revert_run, step, lambda: revert_run.revert(daemon_lab.conn, domain.name(), "s1"))
    edit_domain(daemon_lab, domain)
    edited = xml_of(domain)
    assert [one.finished for one in recover(daemon_lab.conn)] == [finished]
    assert xml_of(domain) == edited
    check_edit(domain)


def test_a_revert_that_fails_is_not_undone_over_an_edit(daemon_lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = three_snapshots(daemon_lab)

    def edits(*_: object) -> None:
        edit_domain(daemon_lab, domain)
        raise DomainError("d", "no")

    with monkeypatch.context() as failing:
        failing.setattr(revert_run, "make_current", edits)
        with pytest.raises(DomainError, match="was edited after it was reverted"):
            revert_run.revert(daemon_lab.conn, domain.name(), "s1")
    check_edit(domain)
    assert [one.finished for one in recover(daemon_lab.conn)] == [True]
    check_edit(domain)
    assert domain.snapshotCurrent().getName() == "s1"


def test_a_revert_to_a_snapshot_that_was_deleted_meanwhile(daemon_lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = three_snapshots(daemon_lab)
    killed(monkeypatch, revert_run, "make_current", lambda: revert_run.revert(daemon_lab.conn, domain.name(), "s1"))
    virsh(daemon_lab, "snapshot-delete", domain.name(), "s1", "--metadata")
    assert [one.finished for one in recover(daemon_lab.conn)] == [True]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_took_the_name_of_a_discarded_one_stays(
    daemon_lab: Lab, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    domain = three_snapshots(daemon_lab)
    top = daemon_lab.folder / "a-000003.vmdk"
    killed(
        monkeypatch,
        revert_run,
        "make_current",
        lambda: revert_run.revert(daemon_lab.conn, domain.name(), "s1", discard=True),
    )
    if replaced:
        daemon_lab.disk("other").rename(top)
    assert [one.finished for one in recover(daemon_lab.conn)] == [True]
    assert top.exists() is replaced
    assert not (daemon_lab.folder / "b-000003.vmdk").exists()


@pytest.mark.parametrize("name", ["s1", "s3"])
def test_delete(daemon_lab: Lab, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    domain = three_snapshots(daemon_lab)
    killed(monkeypatch, delete_run, "_change_xml", lambda: delete_run.delete(daemon_lab.conn, domain.name(), name))
    edit_domain(daemon_lab, domain)
    for other in {"s1", "s2", "s3"} - {name}:
        edit_snapshot(daemon_lab, domain, other)
    assert [one.finished for one in recover(daemon_lab.conn)] == [True]
    check_edit(domain)
    infos = list_snapshots(daemon_lab.conn, domain.name())
    assert {info.name: info.description for info in infos} == dict.fromkeys({"s1", "s2", "s3"} - {name}, NOTE)
    assert [disk.problem for info in infos for disk in info.disks] == [None] * 4


@pytest.mark.parametrize("after", [False, True])
def test_rename(daemon_lab: Lab, monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    domain = three_snapshots(daemon_lab)
    killed(monkeypatch, edit, "_forget", lambda: edit.rename(daemon_lab.conn, domain.name(), "s1", "one"), after=after)
    for other in ("s2", "s3", "one" if after else "s1"):
        edit_snapshot(daemon_lab, domain, other)
    assert [one.finished for one in recover(daemon_lab.conn)] == [True]
    infos = list_snapshots(daemon_lab.conn, domain.name())
    assert {info.name: info.description for info in infos} == dict.fromkeys(("one", "s2", "s3"), NOTE)
    assert {info.name: info.parent for info in infos} == {"one": None, "s2": "one", "s3": "s2"}
    assert [disk.problem for info in infos for disk in info.disks] == [None] * 6
    assert domain.snapshotCurrent().getName() == "s3"


def test_a_disk_that_was_taken_out_counts_as_the_others_do(daemon_lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = three_snapshots(daemon_lab)
    killed(monkeypatch, create_run, "register", lambda: create_snapshot(daemon_lab.conn, domain.name(), "s4"))
    virsh(daemon_lab, "detach-disk", domain.name(), "vdb", "--config")
    assert [one.finished for one in recover(daemon_lab.conn)] == [True]
    assert domain.snapshotCurrent().getName() == "s4"
    assert "b-000004.vmdk" not in xml_of(domain)


def test_a_parent_that_was_deleted_meanwhile(daemon_lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = three_snapshots(daemon_lab)
    killed(monkeypatch, create_run, "register", lambda: create_snapshot(daemon_lab.conn, domain.name(), "s4"))
    virsh(daemon_lab, "snapshot-delete", domain.name(), "s3", "--metadata")
    assert [one.finished for one in recover(daemon_lab.conn)] == [True]
    infos = {info.name: info.parent for info in list_snapshots(daemon_lab.conn, domain.name())}
    assert infos == {"s1": None, "s2": "s1", "s4": "s2"}


def test_another_snapshot_of_the_name_is_not_replaced(
    daemon_lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    domain = three_snapshots(daemon_lab)
    killed(monkeypatch, create_run, "register", lambda: create_snapshot(daemon_lab.conn, domain.name(), "s4"))
    text = virsh(daemon_lab, "snapshot-dumpxml", domain.name(), "s3").replace("<name>s3</name>", "<name>s4</name>")
    (tmp_path / "s4.xml").write_text(text)
    virsh(daemon_lab, "snapshot-create", domain.name(), str(tmp_path / "s4.xml"), "--redefine")
    before, texts = contents(daemon_lab.folder), virsh(daemon_lab, "snapshot-dumpxml", domain.name(), "s4")
    with pytest.raises(DomainError, match=r"has another snapshot named 's4' now.*`recover --abandon -c "):
        recover(daemon_lab.conn)
    assert contents(daemon_lab.folder) == before
    assert virsh(daemon_lab, "snapshot-dumpxml", domain.name(), "s4") == texts
    assert main(["snapshot", "list", "-c", daemon_lab.uri, domain.name()]) == 0
    assert capsys.readouterr().err.startswith("qemu-vmdk-snap: warning: ")
    assert [one.snapshot for one in abandon(daemon_lab.conn, [domain.name()])] == ["s4"]
    assert recover(daemon_lab.conn) == []


@pytest.mark.parametrize(("step", "finished"), [("_define", False), ("register", True)])
def test_a_domain_that_was_renamed_meanwhile(
    daemon_lab: Lab, monkeypatch: pytest.MonkeyPatch, step: str, finished: bool
) -> None:
    domain = daemon_lab.define(daemon_lab.disk("a"))
    killed(monkeypatch, create_run, step, lambda: create_snapshot(daemon_lab.conn, domain.name(), "s1"))
    new = f"{domain.name()}-new"
    virsh(daemon_lab, "domrename", domain.name(), new)
    daemon_lab.adopt(new)
    assert [(one.domain, one.finished) for one in recover(daemon_lab.conn, [new])] == [(new, finished)]
    assert [info.name for info in list_snapshots(daemon_lab.conn, new)] == (["s1"] if finished else [])
