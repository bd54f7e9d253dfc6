"""Snapshots of real domains in the in-process libvirt."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import pytest

import qemu_vmdk_snap as engine
from qemu_vmdk_snap import CidMismatch, DomainError, InvalidRequest, LockBusy, PluginError, create_overlay, open_chain
from qemu_vmdk_snap.domain import connect, xml
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.doctor.domain import check_domain
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.qemu.depth import max_links
from qemu_vmdk_snap.domain.registry import list_snapshots, snapshot_info
from tests.domain.lab import Lab, contents, xml_of

pytestmark = pytest.mark.needs("libvirt", "qemu-system-x86_64")


def test_the_domain_goes_on_in_an_overlay_and_all_else_stays(lab: Lab) -> None:
    base = lab.disk()
    domain = lab.define(base)
    before = xml_of(domain)
    report = create_snapshot(lab.conn, domain.name(), "s1", "first & <best>")
    overlay = lab.folder / "a-000001.vmdk"
    assert [(disk.target, disk.frozen, disk.overlay) for disk in report.disks] == [("vda", base, overlay)]
    (disk,) = xml.list_disks(xml_of(domain))
    assert (disk.path, disk.backing, disk.closed) == (overlay, (base,), True)
    start, end = before.index("<disk "), before.index("</disk>")
    assert xml_of(domain).startswith(before[:start])
    assert "passwd='secret'" in before
    assert xml_of(domain).endswith(before[before.index("<target", start) :])
    assert end > start
    with open_chain(overlay) as chain:
        assert (chain.depth, chain.read_at(0, 6)) == (2, b"base a")
    assert not IntentStore.of(lab.conn).path(domain.UUIDString()).exists()


def test_libvirt_registers_it_with_the_domain_as_it_was(lab: Lab) -> None:
    base = lab.disk()
    domain = lab.define(base)
    create_snapshot(lab.conn, domain.name(), "s1", "first & <best>")
    parsed = xml.parse_snapshot(domain.snapshotLookupByName("s1").getXMLDesc(0))
    assert (parsed.name, parsed.description, parsed.state, parsed.parent) == ("s1", "first & <best>", "shutoff", None)
    assert abs(parsed.creation_time - time.time()) < 120
    assert parsed.disks == (xml.SnapshotDisk("vda", "external", lab.folder / "a-000001.vmdk", base),)
    assert domain.snapshotCurrent().getName() == "s1"


def test_a_chain_of_four_starts_and_the_middle_stays_frozen(lab: Lab) -> None:
    domain = lab.define(lab.disk("a"), lab.disk("b"))
    for name in ("s1", "s2", "s3"):
        create_snapshot(lab.conn, domain.name(), name)
    frozen = {path: digest for path, digest in contents(lab.folder).items() if "000003" not in path}
    assert len(frozen) == 6
    domain.create()
    assert domain.isActive()
    domain.destroy()
    after = contents(lab.folder)
    assert {path: after[path] for path in frozen} == frozen
    infos = list_snapshots(lab.conn, domain.name())
    assert [(info.name, info.parent, info.children, info.current) for info in infos] == [
        ("s1", None, ("s2",), False),
        ("s2", "s1", ("s3",), False),
        ("s3", "s2", (), True),
    ]
    assert [[disk.depth for disk in info.disks] for info in infos] == [[1, 1], [2, 2], [3, 3]]
    assert infos[0].descendants == 2


def test_without_the_spelt_out_chain_libvirt_refuses_to_start(lab: Lab) -> None:
    """Says that the test above could fail: the same files, with the chain left out of the XML."""
    import libvirt

    path = lab.disk()
    for number in (1, 2, 3):
        overlay = lab.folder / f"a-{number}.vmdk"
        create_overlay(overlay, path)
        path = overlay
    with pytest.raises(libvirt.libvirtError, match="was not specified in the image metadata"):
        lab.define(path).create()


def test_a_chain_that_libvirt_could_not_start_is_not_made(lab: Lab) -> None:
    import libvirt

    limit = max_links(lab.conn.getLibVersion())
    chain = [lab.disk("0")]
    for number in range(1, limit + 1):
        chain.insert(0, lab.folder / f"{number}.vmdk")
        create_overlay(chain[0], chain[1], durable=False)
    domain = lab.define(chain[0])

    def stand_on(*links: Path) -> None:
        lab.conn.defineXML(xml.stack(xml_of(domain), {"vda": xml.NewTop(links[0], links[1:])}))

    stand_on(*chain[1:])
    domain.create()
    domain.destroy()
    reason = refuse(lab, domain.name())
    assert f"disk vda has a chain of {limit} links, and this libvirt starts none of more than {limit}" in reason
    bad = [check.text for check in check_domain(lab.conn, domain.name()) if check.verdict == "bad"]
    assert not any(
        "no domain with more than" in text for text in bad
    )  # that the top backs another image is another matter
    stand_on(*chain)
    with pytest.raises(libvirt.libvirtError):
        domain.create()
    (told,) = (check for check in check_domain(lab.conn, domain.name()) if check.subject == "disk vda")
    assert (told.verdict, told.text.split(":")[0]) == ("bad", f"has {limit + 1} links")


@pytest.mark.parametrize(
    ("version", "links"), [(9_000_000, 200), (10_007_999, 200), (10_008_000, 23), (11_010_000, 23), (12_000_000, 200)]
)
def test_how_deep_a_libvirt_goes(version: int, links: int) -> None:
    assert max_links(version) == links


def test_no_guest_can_start_while_the_snapshot_is_taken(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    import libvirt

    domain = lab.define(lab.disk())
    refused = []

    def start_then_create(path: Path, base: Path, **options: int) -> None:
        with pytest.raises(libvirt.libvirtError, match="lock") as error:
            domain.create()
        refused.append(str(error.value))
        create_overlay(path, base, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "create_overlay", start_then_create, raising=False)
    create_snapshot(lab.conn, domain.name(), "s1")
    assert len(refused) == 1
    assert domain.snapshotNum() == 1


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_the_overlay_has_the_mode_of_its_base_and_can_be_written(lab: Lab, mode: int) -> None:
    base = lab.disk()
    base.chmod(mode)
    create_snapshot(lab.conn, lab.define(base).name())
    assert (lab.folder / "a-000001.vmdk").stat().st_mode & 0o7777 == mode | 0o200


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_the_overlay_has_the_owner_of_its_base(lab: Lab) -> None:
    base = lab.disk()
    os.chown(base, 12345, 54321)
    create_snapshot(lab.conn, lab.define(base).name())
    made = (lab.folder / "a-000001.vmdk").stat()
    assert (made.st_uid, made.st_gid) == (12345, 54321)


def test_the_overlay_has_the_access_list_of_its_base(lab: Lab) -> None:
    base = lab.disk()
    base.chmod(0o640)
    # Version 2; owner rw, user 12345 rw, group r, mask rw, others nothing: <tag, permissions, id> each.
    entries = [
        (0x01, 6, 0xFFFFFFFF),
        (0x02, 6, 12345),
        (0x04, 4, 0xFFFFFFFF),
        (0x10, 6, 0xFFFFFFFF),
        (0x20, 0, 0xFFFFFFFF),
    ]
    wanted = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(base, "system.posix_acl_access", wanted)
    except OSError as error:
        pytest.skip(f"no access lists on {lab.folder}: {error.strerror}")
    os.setxattr(base, "user.note", b"of the base alone")
    create_snapshot(lab.conn, lab.define(base).name())
    overlay = lab.folder / "a-000001.vmdk"
    assert os.getxattr(overlay, "system.posix_acl_access") == wanted
    assert "user.note" not in os.listxattr(overlay)
    assert overlay.stat().st_mode == base.stat().st_mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_an_owner_that_cannot_be_given_is_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    base = lab.disk()
    os.chown(base, 12345, 54321)
    domain = lab.define(base)

    def not_permitted(*_: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", not_permitted)
    given = "cannot give a new file the owner 12345:54321 (Operation not permitted): run it as root"
    reason = f"{lab.folder}/a-000001.vmdk: {given}"
    assert refuse(lab, domain.name()) == f"domain {domain.name()}: {reason}"


def test_only_the_wanted_disks_take_part(lab: Lab) -> None:
    domain = lab.define(lab.disk("a"), lab.disk("b"), lab.disk("c"))
    report = create_snapshot(lab.conn, domain.name(), "s1", disks=["vda", str(lab.folder / "b.vmdk")], exclude=["vdb"])
    assert [disk.target for disk in report.disks] == ["vda"]
    assert report.skipped == (("vdb", "was left out"), ("vdc", "was left out"))
    modes = {disk.target: disk.mode for disk in snapshot_info(lab.conn, domain.name(), "s1").disks}
    assert modes == {"vda": "external", "vdb": "no", "vdc": "no"}


def test_the_overlay_goes_where_the_user_says(lab: Lab) -> None:
    other = lab.folder / "other"
    other.mkdir()
    domain = lab.define(lab.disk())
    create_snapshot(lab.conn, domain.name(), "s1", overlays={"vda": other / "top.vmdk"})
    # The next one begins in the other folder, and finds the base through the chain that the XML names.
    report = create_snapshot(lab.conn, domain.name(), "s2")
    assert report.disks[0].chain == (other / "top.vmdk", lab.folder / "a.vmdk")
    assert report.disks[0].overlay == other / "top-000001.vmdk"
    assert snapshot_info(lab.conn, domain.name(), "s2").disks[0].depth == 2
    domain.create()


def test_other_disks_are_passed_over_with_the_reason(lab: Lab) -> None:
    raw = lab.folder / "r.img"
    raw.write_bytes(bytes(4096))
    extra = (
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
        f"<source file='{raw}'/><target dev='vdr'/></disk>"
        "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>"
    )
    domain = lab.define(lab.disk(), extra=extra)
    report = create_snapshot(lab.conn, domain.name())
    assert report.skipped == (("vdr", "has the format raw, not vmdk"), ("sda", "is a cdrom, not a disk"))
    with pytest.raises(DomainError, match="disk vdr has the format raw, not vmdk: it cannot be snapshotted"):
        create_snapshot(lab.conn, domain.name(), required=["vdr"])


def test_a_name_taken_on_disk_is_passed_over_and_kept(lab: Lab) -> None:
    domain = lab.define(lab.disk())
    foreign = lab.folder / "a-000001.vmdk"
    foreign.write_bytes(b"somebody's")
    report = create_snapshot(lab.conn, domain.name())
    assert report.disks[0].overlay == lab.folder / "a-000002.vmdk"
    assert foreign.read_bytes() == b"somebody's"


def test_domains_on_one_base_get_overlays_of_their_own(lab: Lab) -> None:
    base = lab.disk()
    tops = {create_snapshot(lab.conn, lab.define(base).name()).disks[0].overlay.name for _ in range(3)}
    assert tops == {"a-000001.vmdk", "a-000002.vmdk", "a-000003.vmdk"}


def test_a_missing_file_of_a_snapshot_is_told(lab: Lab) -> None:
    domain = lab.define(lab.disk())
    create_snapshot(lab.conn, domain.name(), "s1")
    (lab.folder / "a.vmdk").rename(lab.folder / "gone.vmdk")
    (disk,) = snapshot_info(lab.conn, domain.name(), "s1").disks
    assert disk.missing == (lab.folder / "a.vmdk",)
    assert disk.frozen_bytes is None
    assert disk.problem == f"{lab.folder / 'a.vmdk'}: No such file or directory"


def refuse(lab: Lab, domain: str, **options: str) -> str:
    before = contents(lab.folder)
    with pytest.raises((DomainError, InvalidRequest, CidMismatch, LockBusy)) as error:
        create_snapshot(lab.conn, domain, **options)  # type: ignore[arg-type]
    assert contents(lab.folder) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_refused_changes_nothing(lab: Lab) -> None:
    domain = lab.define(lab.disk())
    name = domain.name()
    create_snapshot(lab.conn, name, "s1")
    before = xml_of(domain)
    assert refuse(lab, name, name="s1") == f"domain {name}: has a snapshot 's1' already"
    assert refuse(lab, name, name="a/b") == "snapshot name 'a/b': must not contain '/'"
    assert refuse(lab, "nobody") == "domain nobody: there is no domain of that name"
    assert xml_of(domain) == before
    assert domain.snapshotNum() == 1


def test_a_domain_without_a_vmdk_disk_is_refused(lab: Lab) -> None:
    domain = lab.define(extra="<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>")
    reason = "has no VMDK disk to snapshot: sda is a cdrom, not a disk"
    assert refuse(lab, domain.name()) == f"domain {domain.name()}: {reason}"


def test_a_broken_chain_is_refused(lab: Lab) -> None:
    base = lab.disk()
    domain = lab.define(base)
    create_snapshot(lab.conn, domain.name(), "s1")
    with open_chain(base, writable=True) as chain:
        chain.write_at(0, b"spoilt")
    assert "was modified after the overlay was made" in refuse(lab, domain.name())


def test_an_image_in_use_is_refused(lab: Lab) -> None:
    base = lab.disk()
    domain = lab.define(base)
    with open_chain(base, writable=True):
        assert "is another process using the image?" in refuse(lab, domain.name())


def test_two_commands_at_once_do_not_meet(lab: Lab) -> None:
    domain = lab.define(lab.disk())
    with IntentStore.of(lab.conn).locked(domain.UUIDString(), domain.name()):
        assert refuse(lab, domain.name()).endswith("another command is changing its snapshots")


def test_an_edit_in_between_is_not_overwritten(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = lab.define(lab.disk())
    edited = xml_of(domain).replace("<memory unit='KiB'>32768", "<memory unit='KiB'>65536")

    def edit_then_create(path: Path, base: Path, **options: int) -> None:
        lab.conn.defineXML(edited)
        create_overlay(path, base, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "create_overlay", edit_then_create, raising=False)
    assert "was edited while the snapshot was prepared" in refuse(lab, domain.name())
    assert "65536" in xml_of(domain)


@pytest.mark.parametrize(
    "uri", ["qemu+ssh://host/system", "qemu+tcp://host/system", "qemu://host/system", "qemu+tls:///x"]
)
def test_a_remote_connection_is_refused(uri: str) -> None:
    with pytest.raises(InvalidRequest, match="is remote, and the disks must be files of this machine"):
        connect.open_connection(uri)


def test_a_connection_that_fails_is_one_line_and_nothing_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PluginError, match=r"^libvirt qemu\+unix:///system\?socket=/nowhere: "):
        connect.open_connection("qemu+unix:///system?socket=/nowhere")
    assert capfd.readouterr().err == ""


def test_a_second_in_process_libvirt_is_refused(lab: Lab, scratch: Path) -> None:
    assert connect.open_connection(lab.uri) is lab.conn
    with pytest.raises(InvalidRequest, match=r"this process has its libvirt in .*, and can have only one"):
        connect.open_connection(f"qemu:///embed?root={scratch}/other")
    assert not (scratch / "other").exists()


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("qemu:///embed", "must name its folder by an absolute path"),
        ("qemu:///embed?root=x", "must name its folder by an absolute path"),
    ],
)
def test_an_unusable_embed_root_is_refused(uri: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        connect.open_connection(uri)


def test_a_root_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="must be at most 60 bytes long"):
        connect.prepare_embed_root(tmp_path / ("x" * 60))
    assert list(tmp_path.iterdir()) == []


def test_without_the_binding_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "libvirt", None)
    with pytest.raises(PluginError, match=r"binding is missing: install python3-libvirt"):
        connect.open_connection("qemu:///system")


def test_names_ids_and_uuids_find_a_domain(lab: Lab) -> None:
    domain = lab.define(lab.disk())
    assert connect.find_domain(lab.conn, domain.UUIDString()).name() == domain.name()
    domain.create()
    assert connect.find_domain(lab.conn, str(domain.ID())).name() == domain.name()
