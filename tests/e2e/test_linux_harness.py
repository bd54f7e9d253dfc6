"""Does the Linux guest do what it is told, on file systems and disks, and is what goes wrong in it told?

VMDK_LINUX_EACH=1 tries every controller, also AHCI, whose kernel is a download of 70 MB.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from qemu_vmdk_snap import CidMismatch, GuestError, InvalidRequest, open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.harness import (
    ChainMaker,
    CommandFailed,
    Disk,
    KnownChain,
    LinuxGuest,
    boot_linux,
    build_guest,
    missing_stamps,
)
from qemu_vmdk_snap.harness.hardware import LINUX_CONTROLLERS as CONTROLLERS
from qemu_vmdk_snap.harness.linux.guest import Ran
from qemu_vmdk_snap.harness.linux.packages import BuildError
from tests.support.schemas import check

pytestmark = [
    pytest.mark.needs("qemu-system-x86_64", "apt-get"),
    pytest.mark.usefixtures("linux_is_made"),
    pytest.mark.timeout(600),
]

MIB = 1 << 20
EACH = os.environ.get("VMDK_LINUX_EACH") == "1"


@pytest.fixture
def chain(tmp_path: Path) -> KnownChain:
    return ChainMaker(tmp_path).base("320M").snapshot()


def uses_a_file_system(guest: LinuxGuest, kind: str, disk: int) -> dict[str, str]:
    guest.mkfs(kind, disk)
    guest.mount(kind, disk)
    guest.check("mkdir /mnt/a && seq 20000 >/mnt/a/numbers && echo hello >/mnt/hello")
    found = guest.sha256()
    guest.umount()
    assert guest.fsck(kind, disk).status == 0
    return found


def test_file_systems_commands_and_a_load(chain: KnownChain, tmp_path: Path) -> None:
    second = ChainMaker(tmp_path / "second").base("64M")
    logs = tmp_path / "logs"
    with boot_linux(chain, writable=True, disks=[Disk(second.top, writable=True)], log_dir=logs) as guest:
        assert guest.run("echo out; echo err >&2; exit 7") == Ran(7, b"out\n", b"err\n")
        assert guest.run("printf '\\0\\1\\r\\n'; cat /dev/null").stdout == b"\0\1\r\n"
        assert len(guest.run("head -c 300000 /dev/zero").stdout) == 300000
        with pytest.raises(
            CommandFailed, match=r"^guest 1\.vmdk: 'cat /none' ended with exit status 1: cat: can't open"
        ):
            guest.check("cat /none")
        with pytest.raises(InvalidRequest, match="'ntfs' is not one of ext4, xfs, vfat"):
            guest.mkfs("ntfs")
        sums = {kind: uses_a_file_system(guest, kind, disk) for kind, disk in (("vfat", 1), ("ext4", 1), ("xfs", 0))}
        assert sums["vfat"] == sums["ext4"] == sums["xfs"]
        assert set(sums["xfs"]) == {"a/numbers", "hello"}
        data = bytes(range(256)) * 8
        guest.write(40 * MIB, data, disk=1)
        assert guest.read(40 * MIB, len(data), disk=1) == data
        guest.start_load(disk=1, offset=MIB, sectors=16)
        deadline = time.monotonic() + 60
        while guest.stamps() < 20:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        guest.kill()  # as a power cut: what was told is there all the same
        told = guest.stamps()
    with open_chain(second.top) as opened:
        assert missing_stamps(opened.read_at(MIB, 16 * 512), told, MIB // 512) == []
        assert opened.read_at(40 * MIB, len(data)) == data
    assert told >= 20


def test_a_kernel_that_panics_is_told_of_at_once(chain: KnownChain, tmp_path: Path) -> None:
    with (
        boot_linux(chain, log_dir=tmp_path / "logs") as guest,
        pytest.raises(GuestError, match=r"waiting for the end of 'echo c >.*': (the guest|Kernel) panic") as caught,
    ):
        guest.run("echo c >/proc/sysrq-trigger")
    assert "sysrq: Trigger a crash" in caught.value.__notes__[0]


def test_what_is_lost_of_a_load_is_named() -> None:
    sectors = [f"stamp {number} {100 + (number - 1) % 4}".ljust(511).encode() + b"\n" for number in range(1, 7)]
    data = b"".join([sectors[4], sectors[5], sectors[2], sectors[3]])
    assert missing_stamps(data, 6, 100) == []
    assert missing_stamps(data, 5, 100) == []
    assert missing_stamps(data, 7, 100) == [7]
    assert missing_stamps(b"".join([sectors[4], sectors[1], bytes(512), sectors[3]]), 6, 100) == [3, 6]
    assert missing_stamps(data, 6, 101) == [3, 4, 5, 6]


def test_a_guest_of_the_cache_that_is_damaged_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build_guest()
    cache = made.kernel.parent.parent
    for path in cache.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    monkeypatch.setenv("PATH", "/nowhere")
    assert build_guest(folder=tmp_path).key == made.key
    with (tmp_path / made.key / "initramfs.cpio").open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    with pytest.raises(BuildError, match="neither apt-get nor dnf: the guest's packages cannot be had"):
        build_guest(folder=tmp_path)
    assert not (tmp_path / made.key).exists()


def test_the_command_that_makes_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guest", "linux", "--output=json"]) == 0
    value = check("guest linux", capsys.readouterr().out)
    assert Path(value["kernel"]).parent.name == value["key"]
    assert main(["guest", "linux"]) == 0
    assert f"{value['initrd']}: " in capsys.readouterr().out


def test_a_controller_without_a_driver(chain: KnownChain) -> None:
    with pytest.raises(InvalidRequest, match=r"controller: the Linux guest has virtio-blk, .* not 'lsi'"):
        boot_linux(chain, controller="lsi")


def test_a_stale_cid_of_a_path_is_refused(chain: KnownChain) -> None:
    with open_chain(chain.at(0).path, writable=True) as opened:
        opened.write_at(0, b"x")
    with pytest.raises(CidMismatch, match="the parent was modified after the overlay was made"):
        boot_linux(chain.top).__enter__()
    with boot_linux(chain.top, check_cids=False) as guest:
        assert guest.run(f"dd if={guest.disk()} count=1").status, "QEMU refuses to read it"
        guest.power_off()


@pytest.mark.skipif(not EACH, reason="VMDK_LINUX_EACH=1 tries every controller")
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_each_controller(chain: KnownChain, tmp_path: Path, controller: str) -> None:
    second = ChainMaker(tmp_path / "second").base("64M")
    with boot_linux(chain, writable=True, controller=controller, disks=[Disk(second.top, writable=True)]) as guest:
        sums = [uses_a_file_system(guest, kind, disk) for kind, disk in (("vfat", 1), ("ext4", 1), ("xfs", 0))]
        assert sums[0] == sums[1] == sums[2]
        guest.discard(0, MIB, disk=1)
        guest.power_off()
    with boot_linux(chain, controller=controller) as guest:
        guest.mount("xfs", options="ro,norecovery")
        assert guest.sha256() == sums[0]
        guest.power_off()
