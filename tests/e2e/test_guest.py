"""Does a booted guest see through the chain what the engine wrote, and we what the guest wrote?"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_vmdk_snap import (
    Chain,
    CidMismatch,
    GuestError,
    ImageOptions,
    InvalidRequest,
    LockBusy,
    RunKind,
    create_image,
    create_overlay,
    open_chain,
)
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.harness import CONTROLLERS, attach, boot, disk_image, floppy_image, pattern, verify_image
from qemu_vmdk_snap.harness.accelerator import boot_seconds
from qemu_vmdk_snap.harness.probe import Answer, command_line, parse_answer
from qemu_vmdk_snap.harness.session import ProbeError, ProbeSession

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img", "qemu-io")

MIB = 1 << 20
SIZE = 40 * MIB + 512


@pytest.fixture(autouse=True)
def logs_of_failures(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Machines that are to fail keep their logs; not for ever."""
    folder = tmp_path_factory.mktemp("logs")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def chain_of(folder: Path, depth: int, *, zeroed: bool = False) -> Path:
    """Return the top of a chain of so many links, each with data of its own that shows through the next ones."""
    create_image(folder / "1.vmdk", SIZE, options=ImageOptions(zeroed_grain=zeroed), durable=False)
    for link in range(1, depth + 1):
        path = folder / f"{link}.vmdk"
        if link > 1:
            create_overlay(path, folder / f"{link - 1}.vmdk", durable=False)
        with open_chain(path, writable=True) as chain:
            chain.write_at(link * MIB + 777, pattern(link, link * 512, 300 * 512))
            chain.write_at(35 * MIB + link * 1000, bytes([link]) * 5000)
            chain.write_at(SIZE - 512 * link, pattern(link, 99 * 512, 512))
    return folder / f"{depth}.vmdk"


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_a_guest_reads_through_the_chain(tmp_path: Path, depth: int) -> None:
    report = verify_image(chain_of(tmp_path, depth))
    assert report.identical, report.mismatches
    assert report.depth == depth
    assert report.stored > 64 * 1024
    assert report.sampled > 0


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_every_controller(tmp_path: Path, controller: str) -> None:
    report = verify_image(chain_of(tmp_path, 2), controller=controller, samples=1)
    assert report.identical, report.mismatches


@pytest.mark.parametrize("depth", [1, 3])
def test_what_the_guest_writes_is_what_we_and_qemu_img_read(tmp_path: Path, depth: int) -> None:
    top = chain_of(tmp_path, depth)
    below = [path.read_bytes() for path in sorted(tmp_path.glob("*.vmdk"))[: depth - 1]]
    with open_chain(top) as chain:
        model = bytearray(chain.read_at(0, SIZE))
        cid = chain.links[0].cid
    writes = [(7, 0, 5), (8, MIB // 512 + 3, 700), (9, (SIZE - 512) // 512, 1), (10, 36 * MIB // 512 - 1, 2)]
    with boot(top, writable=True) as machine:
        for seed, lba, count in writes:
            machine.probe.pattern(seed, lba * 512, count * 512)
            model[lba * 512 : (lba + count) * 512] = pattern(seed, lba * 512, count * 512)
        assert machine.probe.dump(MIB + 3 * 512) == pattern(8, MIB + 3 * 512, 512)
        machine.power_off()
    with open_chain(top) as chain:
        assert chain.read_at(0, SIZE) == model
        assert chain.links[0].cid != cid
    raw = tmp_path / "top.raw"
    subprocess.run(["qemu-img", "convert", "-f", "vmdk", "-O", "raw", top, raw], check=True)
    assert raw.read_bytes() == model
    assert [path.read_bytes() for path in sorted(tmp_path.glob("*.vmdk"))[: depth - 1]] == below


def test_a_guest_boots_from_the_disk_under_test(tmp_path: Path) -> None:
    path = tmp_path / "boots.vmdk"
    create_image(path, 10 * MIB, durable=False)
    with open_chain(path, writable=True) as chain:
        chain.write_at(0, disk_image())
    create_overlay(tmp_path / "top.vmdk", path, durable=False)
    with boot(tmp_path / "top.vmdk", from_disk=True) as machine:
        assert machine.probe.crc(0, len(disk_image())) == zlib.crc32(disk_image())
        machine.power_off(5)


def test_booting_leaves_the_image_as_it_was(tmp_path: Path) -> None:
    top = chain_of(tmp_path, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with boot(top) as machine:
        machine.probe.pattern(1, 0, 4096)
        assert machine.probe.dump(0) == pattern(1, 0, 512)
        machine.power_off()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_zeroed_grains_hide_the_parent_from_the_guest(tmp_path: Path) -> None:
    chain_of(tmp_path, 1, zeroed=True)
    create_overlay(tmp_path / "2.vmdk", tmp_path / "1.vmdk", durable=False)
    subprocess.run(
        ["qemu-io", "-f", "vmdk", "-c", "write -z 1M 1M", tmp_path / "2.vmdk"], check=True, stdout=subprocess.DEVNULL
    )
    with open_chain(tmp_path / "2.vmdk") as chain:
        assert any(run.kind is RunKind.ZERO for run in chain.map())
    assert verify_image(tmp_path / "2.vmdk").identical


# ---- other tools' images ---------------------------------------------------------------------------------------------

SAMPLES = ["twoGbMaxExtentSparse.vmdk", "vmdk-rs-monolithicSparse.vmdk", "plaso-image.vmdk"]


@pytest.mark.parametrize("name", SAMPLES)
def test_images_that_others_wrote(samples: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guest", "verify", str(samples / name)]) == 0
    overlay = tmp_path / "overlay.vmdk"
    create_overlay(overlay, samples / name, durable=False)
    with open_chain(overlay, writable=True, trusted_dirs=[samples]) as chain:
        chain.write_at(1000, b"ours, over theirs")
    assert main(["guest", "verify", "--allow-dir", str(samples), str(overlay)]) == 0
    assert "2 links" in capsys.readouterr().out


# ---- negative controls: what is wrong must be found, and its place told ----------------------------------------------


def stored_at(image: Path, offset: int) -> tuple[Path, int]:
    with open_chain(image, check_cids=False) as chain:
        run = next(chain.map(offset, 512))
        assert run.path is not None
        assert run.file_offset is not None
        return run.path, run.file_offset


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def test_one_flipped_bit_in_a_grain_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = chain_of(tmp_path, 3)
    record = tmp_path / "record.json"
    assert main(["guest", "verify", "--record", str(record), str(top)]) == 0
    path, file_offset = stored_at(top, 2 * MIB + 4096)
    flip(path, file_offset + 100)
    assert path.name == "2.vmdk"
    capsys.readouterr()
    assert main(["guest", "verify", "--against", str(record), str(top)]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[:-1] == [
        f"MISMATCH guest bytes 0x200000 to 0x210000 (data, link 1, byte {file_offset - 4096:#x} of {path}): "
        "the guest reads something else than the record"
    ]
    assert main(["guest", "verify", "--against", str(record), "--output=json", str(top)]) == 1
    value = json.loads(capsys.readouterr().out)
    assert [m["path"] for m in value["mismatches"]] == [str(path)]


def test_a_raw_image_says_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top, raw = chain_of(tmp_path, 3), tmp_path / "top.raw"
    with open_chain(top) as chain:
        raw.write_bytes(chain.read_at(0, SIZE))
    assert main(["guest", "verify", "--against", str(raw), str(top)]) == 0
    assert capsys.readouterr().out.endswith(f" s: as written in {raw}, and guest and engine agree\n")
    path, file_offset = stored_at(top, 2 * MIB + 4096)
    flip(path, file_offset + 100)
    with raw.open("r+b") as file:  # in a hole of the chain, where no sample is taken
        file.seek(20 * MIB + 512 * 777)
        file.write(b"here")
    assert main(["guest", "verify", "--against", str(raw), str(top)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [
        f"MISMATCH guest bytes 0x201000 to 0x201200 (data, link 1, byte {file_offset:#x} of {path}): "
        "the guest reads something else than the raw image",
        "MISMATCH guest bytes 0x1461200 to 0x1461400 (hole, link 2, stored nowhere): "
        "the guest reads something else than the raw image",
    ]
    os.truncate(raw, 30 * MIB)
    first = str(verify_image(top, against=raw).mismatches[0])
    assert first == f"guest bytes {30 * MIB:#x} to {SIZE:#x}: there to the guest or to the raw image, but not to both"


def test_what_a_raw_image_has_in_a_sampled_hole_is_reported_once(tmp_path: Path) -> None:
    create_image(tmp_path / "a.vmdk", 4 * MIB, durable=False)
    raw = tmp_path / "a.raw"
    with raw.open("wb") as file:
        file.truncate(4 * MIB)
        file.write(b"x" * 0x600)  # the first sample has it
        file.seek(0x2A00)
        file.write(b"y" * 0x400)
        file.seek(0xFE00)
        file.write(b"z" * 0x400)  # half in the sample, half outside
    places = [(found.offset, found.length) for found in verify_image(tmp_path / "a.vmdk", against=raw).mismatches]
    assert places == [(0, 0x600), (0x2A00, 0x400), (0xFE00, 0x200), (0x10000, 0x200)]


def test_one_zeroed_table_entry_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = chain_of(tmp_path, 2)
    record = tmp_path / "record.json"
    verify_image(top, record=record)
    raw = bytearray(top.read_bytes())
    assert stored_at(top, 2 * MIB + 64 * 1024)[0] == top
    for gd_field in (48, 56):  # both copies
        gd = int.from_bytes(raw[gd_field : gd_field + 8], "little") * 512
        gt = int.from_bytes(raw[gd : gd + 4], "little") * 512
        assert raw[gt + 4 * 33 : gt + 4 * 34] != bytes(4)
        raw[gt + 4 * 33 : gt + 4 * 34] = bytes(4)
    top.write_bytes(raw)
    capsys.readouterr()
    assert main(["guest", "verify", "--against", str(record), str(top)]) == 1
    assert capsys.readouterr().out.splitlines()[:-1] == [
        "MISMATCH guest bytes 0x210000 to 0x220000 (hole, link 1, stored nowhere): "
        "the guest reads something else than the record"
    ]


def test_a_record_of_another_disk_is_found_out(tmp_path: Path) -> None:
    create_image(tmp_path / "small.vmdk", 2 * MIB, durable=False)
    with open_chain(tmp_path / "small.vmdk", writable=True) as chain:
        chain.write_at(MIB + 512, b"at the end")
    record = tmp_path / "record.json"
    assert verify_image(tmp_path / "small.vmdk", record=record).identical
    top = chain_of(tmp_path, 1)
    first = [str(mismatch) for mismatch in verify_image(top, against=record).mismatches]
    assert first[0] == f"guest bytes 0x200000 to {SIZE:#x}: there to the guest or to the record, but not to both"
    assert "(data, link 0, byte " in first[1]


def test_a_place_that_the_guest_cannot_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails, by the session that is made to hear so; all but one sector is read."""
    top = chain_of(tmp_path, 2)
    original = ProbeSession.crc

    def failing(self: ProbeSession, offset: int, length: int) -> int:
        if offset <= MIB + 2048 < offset + length:
            raise ProbeError("1.vmdk", "crc", "bios 0c")
        return original(self, offset, length)

    monkeypatch.setattr(ProbeSession, "crc", failing)
    (mismatch,) = verify_image(top).mismatches
    place = f"guest bytes {MIB + 2048:#x} to {MIB + 2560:#x} (data, link 1, byte "
    assert str(mismatch).startswith(place)
    assert str(mismatch).endswith("1.vmdk): the guest cannot read (bios 0c)")


def test_a_stale_cid_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = chain_of(tmp_path, 2)
    with open_chain(tmp_path / "1.vmdk", writable=True) as chain:
        chain.write_at(0, b"modified")
    assert main(["guest", "verify", str(top)]) == 67
    assert "the parent was modified after the overlay was made" in capsys.readouterr().err
    with pytest.raises(CidMismatch):
        verify_image(top)


def test_a_guest_that_reads_otherwise_than_the_engine_is_narrowed_to_the_sector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is made to misread one byte: what it and the guest read then differs as it never should."""
    top = chain_of(tmp_path, 1)
    original = Chain.read_at

    def lying(self: Chain, offset: int, length: int) -> bytes:
        data = bytearray(original(self, offset, length))
        if offset <= MIB + 1024 < offset + length:
            data[MIB + 1024 - offset] ^= 1
        return bytes(data)

    monkeypatch.setattr(Chain, "read_at", lying)
    report = verify_image(top)
    seen = [(m.offset, m.length, m.expected) for m in report.mismatches]
    assert seen == [(MIB + 1024, 512, "engine")]


# ---- machines that fail ----------------------------------------------------------------------------------------------


def test_a_machine_that_dies_is_noticed_at_once(tmp_path: Path) -> None:
    top = chain_of(tmp_path, 1)

    def read_until_it_dies() -> None:
        with boot(top, log_dir=tmp_path / "log") as machine:
            threading.Timer(0.2, os.kill, (machine.pid, signal.SIGKILL)).start()
            while True:
                machine.probe.crc(0, MIB)

    with pytest.raises(GuestError, match="QEMU ended with -9") as caught:  # not: no answer in time
        read_until_it_dies()
    assert f"(logs: {tmp_path / 'log'})" in str(caught.value)
    assert {path.name for path in (tmp_path / "log").iterdir()} >= {"command", "serial.log", "stderr.log"}
    assert b"probe 1" in (tmp_path / "log/serial.log").read_bytes()


def test_qemus_own_words_are_told(tmp_path: Path) -> None:
    path = tmp_path / "no.vmdk"
    path.write_bytes(b"not a VMDK" * 100)
    with pytest.raises(GuestError, match=r"QEMU ended with 1: .*no\.vmdk.*invalid VMDK image descriptor"), boot(path):
        pass


def test_logs_are_kept_for_the_callers_own_failure_alone(tmp_path: Path, logs_of_failures: Path) -> None:
    top = chain_of(tmp_path, 1)
    with boot(top) as machine:
        machine.power_off()
    with pytest.raises(LockBusy), boot(top):
        raise LockBusy(top, "write")
    assert not list(logs_of_failures.iterdir())
    with pytest.raises(AssertionError) as caught, boot(top):
        raise AssertionError
    (folder,) = logs_of_failures.iterdir()
    assert caught.value.__notes__ == [f"logs of the guest: {folder}"]
    assert b"probe 1" in (folder / "serial.log").read_bytes()


def test_beyond_32_bits_and_what_the_probe_refuses(tmp_path: Path) -> None:
    disk, border = tmp_path / "disk.raw", 1 << 32
    disk.touch()
    os.truncate(disk, 3 << 40)
    with boot(disk, image_format="raw", controller="virtio-blk") as machine:
        probe = machine.probe
        assert probe.size() == 3 << 40
        probe.pattern(7, (border - 50) * 512, 300 * 512)
        assert probe.crc((border - 50) * 512, 300 * 512) == zlib.crc32(pattern(7, (border - 50) * 512, 300 * 512))
        assert probe.dump(0) == bytes(512)
        end = (3 << 40) // 512
        for command, error in {
            "hell": "unknown",
            "sizes": "unknown",
            "": "unknown",
            "size 0": "usage",
            "crc 0": "usage",
            "crc 0 1 2": "usage",
            "crc 0 1g": "usage",
            "crc 0 10000000000000001": "usage",
            "pattern 100000000 0 1": "usage",
            "off 80": "usage",
            "off": "usage",
            f"crc {end:x} 1": "bios 01",
            "dump ffffffffffffffff": "bios 01",
        }.items():
            with pytest.raises(ProbeError) as caught:
                probe.command(command)
            assert caught.value.answer == error, command
        assert probe.command("crc 0 0") == "00000000"
        assert probe.command("hello") == "probe 1 00"
        machine.power_off(0x7F)


def test_a_disk_that_the_bios_sees_a_part_of_is_not_verified(tmp_path: Path) -> None:
    create_image(tmp_path / "d.vmdk", (2 << 40) + 512, options=ImageOptions(grain_size=1 << 20), durable=False)
    with pytest.raises(InvalidRequest, match="the BIOS sees only 2 TiB of a disk on lsi: take another"):
        verify_image(tmp_path / "d.vmdk", controller="lsi")
    assert verify_image(tmp_path / "d.vmdk", controller="ahci").identical


@pytest.fixture
def bare_qemu(tmp_path: Path) -> list[str]:
    """QEMU's words for the probe on its floppy, without a serial line."""
    (tmp_path / "floppy.img").write_bytes(floppy_image())
    create_image(tmp_path / "d.vmdk", MIB, durable=False)
    words = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "16"]
    words += ["-drive", f"if=floppy,format=raw,readonly=on,file={tmp_path / 'floppy.img'}"]
    return [*words, "-drive", f"if=ide,format=vmdk,file={tmp_path / 'd.vmdk'},snapshot=on"]


@contextlib.contextmanager
def running(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with the block, whatever happens there: Popen's own block would wait for it."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_attach_by_a_unix_socket(bare_qemu: list[str], scratch: Path) -> None:
    path = scratch / "s"
    with running([*bare_qemu, "-serial", f"unix:{path},server=on,wait=on"]) as qemu:
        probe = attach(path)
        assert probe.size() == MIB
        probe.power_off()
        assert qemu.wait(60) == 0  # no isa-debug-exit here: by ACPI
        probe.close()


def test_the_probe_notices_every_damaged_byte(bare_qemu: list[str], scratch: Path) -> None:
    words = [*bare_qemu, "-serial", f"unix:{scratch / 's'},server=on,wait=on"]
    with running(words), socket.socket(socket.AF_UNIX) as line:
        attach_when_there(line, scratch / "s")
        answers = line.makefile("rb")
        while b"00 ok probe 1 00" not in answers.readline():
            pass
        whole = command_line("07", "size")
        for i in range(len(whole) - 1):
            line.sendall(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
            assert parse_answer(answers.readline().rstrip()) == Answer("??", False, "sum"), f"byte {i} changed"
            line.sendall(whole[:i] + whole[i + 1 :])
            assert parse_answer(answers.readline().rstrip()) == Answer("??", False, "sum"), f"byte {i} lost"
        line.sendall(b"x" * 300 + b"\n\n" + whole)
        for expected in (
            Answer("??", False, "sum"),
            Answer("??", False, "sum"),
            Answer("07", True, f"{MIB // 512:016x}"),
        ):
            assert parse_answer(answers.readline().rstrip()) == expected
        answers.close()


def attach_when_there(line: socket.socket, path: Path) -> None:
    deadline = time.monotonic() + 60
    line.settimeout(60)
    while line.connect_ex(str(path)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_attach_to_a_terminal_late_and_again(bare_qemu: list[str]) -> None:
    with running([*bare_qemu, "-serial", "pty"]) as qemu:
        assert qemu.stdout is not None
        terminal = qemu.stdout.readline().split()[4]
        assert terminal.startswith("/dev/pts/")
        for _ in range(2):
            time.sleep(0.3)  # its own hello is said, and lost
            probe = attach(terminal)
            assert probe.size() == MIB
            probe.close()
        probe = attach(terminal)
        probe.power_off()
        assert qemu.wait(60) == 0
        probe.close()


def test_a_line_that_nobody_answers(scratch: Path) -> None:
    with pytest.raises(GuestError, match="cannot connect: No such file"):
        attach(scratch / "nothing", seconds=0.1)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(scratch / "silent"))
        server.listen(1)
        with pytest.raises(GuestError, match="waiting for the probe's first line: no answer in time"):
            attach(scratch / "silent", seconds=0.1)


def test_tcg_boots_the_probe_and_a_limit_is_kept() -> None:
    assert boot_seconds("tcg", 100.0) is not None
    assert boot_seconds("tcg", 0.01) is None


# ---- the front door --------------------------------------------------------------------------------------------------


@pytest.mark.needs("libvirt", "virsh")
def test_the_demo(scratch: Path) -> None:
    kept = scratch / "kept"
    words = [sys.executable, "-m", "qemu_vmdk_snap", "demo", "--keep", str(kept)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "56 reads by guests, 0 differ" in done.stdout
    assert "before-guest\n  |\n  +- after-guest" in done.stdout
    assert verify_image(kept / "disk-000002.vmdk").depth == 3
    shutil.rmtree(kept)


@pytest.mark.needs("libvirt")
def test_the_second_half_of_the_demo(scratch: Path) -> None:
    kept = scratch / "kept"
    words = [sys.executable, "-m", "qemu_vmdk_snap", "demo", "--served", "--keep", str(kept)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " reads by guests, 0 differ" in done.stdout
    assert "where it was, without a boot" in done.stdout
    shutil.rmtree(kept)
