"""What served disks are told and asked, without a guest: words, places, files with memory, sockets without a server."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from qemu_vmdk_snap.cli.snapshot.create import parse_memspec
from qemu_vmdk_snap.domain.hooks import policy
from qemu_vmdk_snap.domain.served import place, server
from qemu_vmdk_snap.domain.served.control import Control, NoServer, status_of
from qemu_vmdk_snap.domain.served.memory import memory_files, saved_xml, unlink_memory
from qemu_vmdk_snap.domain.xml import SnapshotXml, snapshot_xml
from qemu_vmdk_snap.domain.xml.served import ServedDisk
from qemu_vmdk_snap.errors import DomainError, InvalidRequest

UUID = "01234567-89ab-cdef-0123-456789abcdef"


def memory(path: Path, *, magic: bytes = b"LibvirtQemudSave", uuid: str = UUID) -> Path:
    """Return a file that begins as one of libvirt's saved states."""
    text = f"<domain type='kvm'><name>d</name><uuid>{uuid}</uuid></domain>".encode() + b"\0"
    path.write_bytes(struct.pack("<16sII", magic, 2, len(text)).ljust(92, b"\0") + text + b"pages")
    return path


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("/img/m", "/img/m"),
        ("file=/img/m", "/img/m"),
        ("/img/m,snapshot=external", "/img/m"),
        ("snapshot=external,file=/img/a,,b", "/img/a,b"),
    ],
)
def test_a_memspec_is_read_as_virsh_reads_it(text: str, file: str) -> None:
    assert parse_memspec(text) == Path(file)


@pytest.mark.parametrize("text", ["snapshot=internal", "snapshot=external", "/img/m,snapshot=no", "file="])
def test_memory_goes_to_a_file_or_nowhere(text: str) -> None:
    with pytest.raises(InvalidRequest, match="memspec"):
        parse_memspec(text)


def test_what_is_no_saved_memory_of_the_domain_is_neither_used_nor_deleted(tmp_path: Path) -> None:
    good = memory(tmp_path / "good")
    assert "<name>d</name>" in saved_xml(good, "d", UUID)
    other = memory(tmp_path / "other", uuid=UUID.replace("0", "1"))
    half = memory(tmp_path / "half", magic=b"LibvirtQemudPart")
    text = tmp_path / "text"
    text.write_text("notes of somebody's\n" * 20)
    for path, reason in ((other, "another domain"), (half, "interrupted"), (text, "no saved memory")):
        with pytest.raises(DomainError, match=reason):
            saved_xml(path, "d", UUID)
    with pytest.raises(DomainError, match="is not there"):
        saved_xml(tmp_path / "gone", "d", UUID)
    gone = {path.name for path in (good, other, half, text) if unlink_memory(str(path), "d", UUID)}
    assert gone == {"good", "half"}
    assert not unlink_memory(str(tmp_path / "gone"), "d", UUID)
    assert (other.exists(), text.exists()) == (True, True)


def test_the_memory_of_all_snapshots_is_found(tmp_path: Path) -> None:
    files = [memory(tmp_path / "m1"), tmp_path / "gone"]
    headers = [SnapshotXml("s", "running", 1, memory="external", memory_file=file) for file in (*files, files[0], None)]
    texts = [snapshot_xml(header, "<domain><name>d</name></domain>") for header in headers]
    assert memory_files("d", UUID, texts) == [files[0]]


def test_where_no_server_is_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(NoServer, match="its disk is not served"):
        Control("d", tmp_path / "nothing")
    assert status_of("d", tmp_path / "nothing") is None


def test_a_folder_that_others_may_write_gets_no_sockets(tmp_path: Path) -> None:
    disk = ServedDisk("vda", tmp_path / "run" / "s.sock", tmp_path / "run" / "s.sock.control")
    place.make_folder(disk)
    assert disk.socket.parent.stat().st_mode & 0o777 == 0o711
    disk.socket.parent.chmod(0o700)  # as a server makes it for itself
    place.make_folder(disk)
    assert disk.socket.parent.stat().st_mode & 0o777 == 0o711
    disk.socket.parent.chmod(0o777)
    with pytest.raises(InvalidRequest, match="could plant sockets"):
        place.make_folder(disk)


def test_a_disk_that_is_not_served_has_no_command_line() -> None:
    with pytest.raises(DomainError, match="has no served disk vda"):
        server.words_of("<domain><name>d</name><devices/></domain>", "vda")


def test_a_policy_can_leave_the_servers_to_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "d.toml"
    path.write_text("serve = false\n")
    assert policy.load(path).serve is False
    path.write_text("serve = 1\n")
    with pytest.raises(InvalidRequest, match="serve = 1 must be true or false"):
        policy.load(path)
