"""Who needs a file, by what libvirt names: forms of naming, pools, and files that cannot be looked at."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap import CidMismatch, DomainError, LockBusy, StillNeeded, create_overlay, follow, open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.delete import preflight
from qemu_vmdk_snap.domain.delete.run import delete
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.journal.recover import recover
from qemu_vmdk_snap.domain.needs.needed import Needed
from qemu_vmdk_snap.domain.registry import list_snapshots
from qemu_vmdk_snap.domain.revert.run import revert
from qemu_vmdk_snap.domain.xml import list_disks
from qemu_vmdk_snap.domain.xml.named import frozen_files, named_chains
from tests.domain.lab import Lab, contents, xml_of

if TYPE_CHECKING:
    import libvirt

pytestmark = pytest.mark.needs("libvirt", "qemu-system-x86_64")

SNAPSHOT = """<domainsnapshot><name>s</name><disks>
  <disk name='vda' snapshot='external' type='file'><source file='/i/a-1.vmdk'/></disk>
  <disk name='vdb' snapshot='no'/></disks>
<domain><devices>
  <disk type='block' device='disk'><driver type='vmdk'/><source dev='/i/a.vmdk/.'/><target dev='vda'/></disk>
  <disk type='file' device='disk'><driver type='vmdk'/><source file='/i/./b.vmdk'/>
    <backingStore type='file'><format type='vmdk'/><source file='/i/b0.vmdk'/><backingStore/></backingStore>
    <mirror type='file'><source file='/i/m.vmdk'/></mirror><target dev='vdb'/></disk>
  <disk type='file' device='cdrom'><driver type='raw'/><source file='/i/x.iso'/><target dev='sda'/></disk>
  <disk type='file' device='cdrom'><target dev='sdb'/></disk>
  <disk type='volume' device='disk'><driver type='qcow2'/><source pool='p' volume='v'/><target dev='vdc'/></disk>
</devices></domain></domainsnapshot>"""


def write(path: Path, text: bytes, offset: int = 0) -> None:
    with open_chain(path, writable=True, trusted_dirs=["/"]) as chain:
        chain.write_at(offset, text.ljust(512, b"."))


def read(path: Path, offset: int = 0, length: int = 5) -> bytes:
    with open_chain(path, trusted_dirs=["/"]) as chain:
        return chain.read_at(offset, length)


def top(domain: libvirt.virDomain, number: int = 0) -> Path:
    path = list_disks(xml_of(domain))[number].path
    assert path is not None
    return path


def test_every_form_of_naming_a_file_is_read() -> None:
    found = named_chains(SNAPSHOT, lambda pool, volume: Path("/pools", pool, volume))
    assert [(chain.disk, [str(file.path) for file in chain.files], chain.closed, chain.role) for chain in found] == [
        ("vda", ["/i/a.vmdk"], False, "disk"),
        ("vdb", ["/i/b.vmdk", "/i/b0.vmdk"], True, "disk"),
        ("vdb", ["/i/m.vmdk"], False, "extra"),
        ("sda", ["/i/x.iso"], True, "disk"),
        ("vdc", ["/pools/p/v"], False, "disk"),
        ("vda", ["/i/a-1.vmdk"], False, "overlay"),
    ]
    assert frozen_files(SNAPSHOT, lambda *_: Path("/v")) == [Path("/i/a.vmdk")]


def test_a_chain_is_followed_whatever_the_cids_say(lab: Lab) -> None:
    base = lab.disk()
    below = lab.folder / "deep"
    below.mkdir()
    first, second = below / "first.vmdk", lab.folder / "second.snap1"
    create_overlay(first, base, durable=False)
    create_overlay(second, first, durable=False)
    write(base, b"written since")
    followed = follow(second)
    assert [path.resolve() for path in followed.files] == [second, first, base]
    assert followed.problem is None
    base.unlink()
    problem = follow(second).problem
    assert problem is not None
    assert problem[0].name == "first.vmdk"
    assert "cannot be found" in problem[1]


def test_a_volume_is_found_in_a_pool_whether_it_is_active_or_not(daemon_lab: Lab) -> None:
    lab = daemon_lab
    domain = lab.define(lab.disk())
    create_snapshot(lab.conn, domain.name(), "s1")
    base = lab.folder / "a.vmdk"
    pool = lab.conn.storagePoolDefineXML(
        f"<pool type='dir'><name>images</name><target><path>{lab.folder}</path></target></pool>"
    )
    lab.define(
        extra="<disk type='volume' device='disk'><driver name='qemu' type='vmdk'/>"
        "<source pool='images' volume='a.vmdk'/><target dev='vda' bus='virtio'/></disk>"
    )
    try:
        for active in (False, True):
            if active:
                pool.create()
            needed = Needed.read(lab.conn, domain)
            others = needed.of_others(domain.UUIDString())
            assert [file.path for holder in others for file in holder.chain.files] == [base]
            before = contents(lab.folder)
            with pytest.raises(StillNeeded, match="has it as its disk vda"):
                delete(lab.conn, domain.name(), "s1")
            assert contents(lab.folder) == before
    finally:
        if pool.isActive():
            pool.destroy()
        pool.undefine()


def test_a_disk_that_is_a_link_is_followed_to_its_file(lab: Lab) -> None:
    store = lab.folder / "store"
    store.mkdir()
    real = lab.disk("a", store)
    link = lab.folder / "link.vmdk"
    link.symlink_to(real)
    domain = lab.define(link)
    create_snapshot(lab.conn, domain.name(), "s1")
    write(top(domain), b"later")
    delete(lab.conn, domain.name(), "s1")
    assert (top(domain), link.is_symlink(), read(real)) == (link, True, b"later")
    assert sorted(path.name for path in lab.folder.rglob("*.vmdk")) == ["a.vmdk", "link.vmdk"]


def test_a_disk_in_a_linked_folder_is_merged_and_not_copied(lab: Lab) -> None:
    store = lab.folder / "store"
    store.mkdir()
    lab.disk("a", store)
    (lab.folder / "linked").symlink_to(store)
    domain = lab.define(lab.folder / "linked" / "a.vmdk")
    for name in ("s1", "s2"):
        create_snapshot(lab.conn, domain.name(), name)
        write(top(domain), name.encode())
    (deleted,) = delete(lab.conn, domain.name(), "s1").deleted
    assert [work.mode for work in deleted.work] == ["merge"]
    assert read(top(domain)) == b"s2..."
    assert [disk.problem for info in list_snapshots(lab.conn, domain.name()) for disk in info.disks] == [None]
    domain.create()
    domain.destroy()


def test_locks_are_found_before_anything_is_recorded(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = lab.define(lab.disk("a"), lab.disk("b"))
    create_snapshot(lab.conn, domain.name(), "s1")
    before = (contents(lab.folder), xml_of(domain))
    with monkeypatch.context() as watched:
        watched.setattr(IntentStore, "write", lambda *_: pytest.fail("it was recorded"))
        for name in ("a.vmdk", "a-000001.vmdk", "b.vmdk", "b-000001.vmdk"):
            with open_chain(lab.folder / name), pytest.raises(LockBusy):
                delete(lab.conn, domain.name(), "s1")
    assert (contents(lab.folder), xml_of(domain)) == before
    delete(lab.conn, domain.name(), "s1")


def test_too_little_space_is_found_before_anything_is_recorded(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = lab.define(lab.disk("a"))
    create_snapshot(lab.conn, domain.name(), "s1")
    write(top(domain), b"over what is there")
    monkeypatch.setattr(preflight, "_free", lambda path: 1024)
    delete(lab.conn, domain.name(), "s1")  # the grain is there already: nothing new is stored
    create_snapshot(lab.conn, domain.name(), "s2")
    write(top(domain), b"a new grain", 1 << 20)
    with pytest.raises(DomainError, match=r"a\.vmdk would grow by 65536 bytes, and its file system has 1024 left"):
        delete(lab.conn, domain.name(), "s2")
    assert IntentStore.of(lab.conn).uuids() == []


def test_what_was_begun_stays_recorded_until_it_is_finished(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """One disk is merged already when the other one fails: what the snapshot held is gone, so the delete goes on."""
    from qemu_vmdk_snap.ops.edit import commit

    domain = lab.define(lab.disk("a"), lab.disk("b"))
    create_snapshot(lab.conn, domain.name(), "s1")
    for number in (0, 1):
        write(top(domain, number), b"later")
    store, real = IntentStore.of(lab.conn), commit.commit

    def full(path: str, **options: object) -> object:
        if path.endswith("b-000001.vmdk"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return real(path, **options)  # type: ignore[arg-type]  # as they came

    with monkeypatch.context() as broken:
        broken.setattr(commit, "commit", full)
        with pytest.raises(DomainError, match=r"No space left .* is not finished: `recover` resumes it"):
            delete(lab.conn, domain.name(), "s1")
    assert store.uuids() == [domain.UUIDString()]
    assert [read(top(domain, number)) for number in (0, 1)] == [b"later", b"later"]
    (result,) = recover(lab.conn)
    assert (result.operation, result.finished) == ("delete", True)
    assert [top(domain, number).name for number in (0, 1)] == ["a.vmdk", "b.vmdk"]
    assert [read(top(domain, number)) for number in (0, 1)] == [b"later", b"later"]


def test_a_prune_deletes_the_good_ones_and_reports_the_bad_one(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    domain = lab.define(lab.disk("a"))
    for name in ("s1", "s2", "s3", "s4"):
        create_snapshot(lab.conn, domain.name(), name)
        write(top(domain), name.encode())
    stranger = lab.folder / "stranger.new"
    create_overlay(stranger, lab.folder / "a-000001.vmdk", durable=False)  # upon what s2 froze
    shown = read(stranger)
    words = ["snapshot", "prune", "-c", lab.uri, domain.name(), "--keep-last=1"]
    assert main([*words, "--dry-run"]) == 68
    assert "Domain snapshot s2 cannot be deleted" in capsys.readouterr().out
    assert main(words) == 68
    printed = capsys.readouterr()
    assert "Domain snapshot s3 deleted" in printed.out
    assert "stranger.new" in printed.err
    assert len(printed.err.splitlines()) <= 2
    left = [info.name for info in list_snapshots(lab.conn, domain.name())]
    assert "s3" not in left
    assert {"s2", "s4"} <= set(left)
    assert (read(stranger), read(top(domain))) == (shown, b"s4...")
    assert IntentStore.of(lab.conn).uuids() == []


def test_after_a_rename_everything_works(lab: Lab) -> None:
    domain = lab.define(lab.disk("a"))
    for name in ("s1", "s2"):
        create_snapshot(lab.conn, domain.name(), name)
        write(top(domain), name.encode())
    new = f"{domain.name()}-renamed"
    domain.rename(new, 0)
    domain = lab.conn.lookupByName(new)
    try:
        revert(lab.conn, new, "s1")
        create_snapshot(lab.conn, new, "s3")
        revert(lab.conn, new, "s2", discard=True)
        delete(lab.conn, new, ["s1", "s2", "s3"])
        assert [one.name() for one in lab.conn.listAllDomains() if one.UUIDString() == domain.UUIDString()] == [new]
        assert read(top(domain)) == b"s1..."
    finally:
        domain.undefineFlags(2)


@pytest.mark.parametrize("command", ["delete", "prune"])
def test_a_missing_link_of_the_domain_itself_holds_everything(lab: Lab, command: str) -> None:
    domain = lab.define(lab.disk("a"))
    for name in ("s1", "s2", "s3"):
        create_snapshot(lab.conn, domain.name(), name)
        write(top(domain), name.encode())
    away = lab.folder / "away.bak"
    (lab.folder / "a-000002.vmdk").rename(away)
    before = (contents(lab.folder), xml_of(domain))
    words = {"delete": ["delete", domain.name(), "s1"], "prune": ["prune", domain.name(), "--keep-last=1"]}[command]
    assert main(["snapshot", *words, "-c", lab.uri]) != 0
    assert (contents(lab.folder), xml_of(domain)) == before
    away.rename(lab.folder / "a-000002.vmdk")
    assert main(["snapshot", *words, "-c", lab.uri]) == 0
    assert read(top(domain)) == b"s3..."


def test_a_missing_disk_of_another_domain_is_given_up_or_spelled_out(lab: Lab) -> None:
    domain = lab.define(lab.disk("a"))
    create_snapshot(lab.conn, domain.name(), "s1")
    gone = lab.folder / "unmounted" / "b.vmdk"
    lab.define(gone)
    with pytest.raises(StillNeeded, match=rf"{gone} does not exist, and is of the disk vda of domain d\d+: it may"):
        delete(lab.conn, domain.name(), "s1")
    lab.close(domain)
    lab.define(gone, disk_xml={"vda": "<backingStore/>"})  # it is a base: it cannot need anything else
    delete(lab.conn, domain.name(), "s1")


# A revert and the disks that took no part.


def test_a_disk_that_took_no_part_keeps_its_top(lab: Lab) -> None:
    domain = lab.define(lab.disk("a"), lab.disk("b"))
    create_snapshot(lab.conn, domain.name(), "s1", disks=["vda"])
    create_snapshot(lab.conn, domain.name(), "s2")
    write(lab.folder / "b-000001.vmdk", b"vdb")
    before = xml_of(domain)
    report = revert(lab.conn, domain.name(), "s1", discard=True)
    assert (top(domain, 1), read(top(domain, 1), length=3)) == (lab.folder / "b-000001.vmdk", b"vdb")
    assert lab.folder / "b-000001.vmdk" not in report.discarded
    element = before[before.index("<source file='" + str(lab.folder / "b-000001.vmdk")) :].split("</disk>")[0]
    assert element in xml_of(domain)
    domain.create()
    domain.destroy()


def test_a_disk_that_is_no_longer_there_gets_an_overlay_where_it_is_frozen(lab: Lab) -> None:
    domain = lab.define(lab.disk("a"), lab.disk("b"))
    create_snapshot(lab.conn, domain.name(), "s1", disks=["vda"])
    create_snapshot(lab.conn, domain.name(), "s2")
    text = xml_of(domain)
    start, end = text.rindex("<disk "), text.rindex("</disk>") + len("</disk>")
    lab.conn.defineXML(text[:start] + text[end:])
    report = revert(lab.conn, domain.name(), "s1")
    assert top(domain, 1) == lab.folder / "b-000002.vmdk"
    assert [disk.target for disk in report.disks] == ["vda", "vdb"]


def test_a_frozen_file_that_was_written_is_not_gone_back_to(lab: Lab) -> None:
    domain = lab.define(lab.disk("a"))
    create_snapshot(lab.conn, domain.name(), "s1")
    write(lab.folder / "a.vmdk", b"by hand")
    before = (contents(lab.folder), xml_of(domain))
    with pytest.raises(CidMismatch, match="--relink-cids"):
        revert(lab.conn, domain.name(), "s1")
    assert (contents(lab.folder), xml_of(domain)) == before


def test_what_a_revert_replaces_is_said(lab: Lab) -> None:
    domain = lab.define(lab.disk("a"))
    create_snapshot(lab.conn, domain.name(), "s1")
    assert revert(lab.conn, domain.name(), "s1").notes == ()
    lab.conn.defineXML(xml_of(domain).replace("<memory unit='KiB'>32768", "<memory unit='KiB'>65536"))
    (note,) = revert(lab.conn, domain.name(), "s1").notes
    assert "without what was changed since in: " in note
    assert "memory" in note
