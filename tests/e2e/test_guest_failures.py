"""Is a guest that fails told of, with the right words, and with all that one needs to look for the cause?

Each has an image of its own whose boot sector does the wrong thing.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_vmdk_snap import GuestError, InvalidRequest, create_image, create_overlay, open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.harness import Console, Content, Machine, boot, disk_image

pytestmark = pytest.mark.needs("qemu-system-x86_64")

MIB = 1 << 20
HALT = b"\xfa\xf4\xeb\xfd"  # cli; again: hlt; jmp again
LOOP = b"\xeb\xfe"  # again: jmp again
DEAF_LOOP = b"\xfa\xeb\xfe"  # cli; again: jmp again
RESET = b"\xfa\x0f\x01\x1e\x00\x7d\xcc"  # cli; lidt [0x7d00], which is zeros; int3
PANIC = b"\xba\x05\x05\xb0\x01\xee" + HALT  # mov dx, 0x505; mov al, 1; out dx, al: QEMU's pvpanic
CHATTER = b"\xba\xf8\x03\xb0.\xee\xeb\xfd"  # mov dx, COM1; mov al, '.'; again: out dx, al; jmp again


def bootable(path: Path, code: bytes | None) -> Path:
    create_image(path, 4 * MIB, durable=False)
    if code is not None:
        with open_chain(path, writable=True) as chain:
            chain.write_at(0, code.ljust(510, b"\0") + b"\x55\xaa")
    return path


# mov dx, 0x3fd; again: in al, dx; test al, 1; jz again; mov dx, COM1; in al, dx; out dx, al; and anew
ECHO = b"\xba\xfd\x03\xec\xa8\x01\x74\xfb\xba\xf8\x03\xec\xee\xeb\xf1"
# mov dx, 0x602; mov ax, 0x100; out dx, ax: the button sets its bit; mov dx, 0x600; again: in ax, dx; test ah, 1;
# jz again; mov dx, 0x604; mov ax, 0x2000; out dx, ax: off
BUTTON = b"\xba\x02\x06\xb8\x00\x01\xef\xba\x00\x06\xed\xf6\xc4\x01\x74\xfa\xba\x04\x06\xb8\x00\x20\xef" + HALT


def prompt(code: bytes, text: bytes = b"login:") -> bytes:
    """Return code that writes `text` to the serial port, and goes on with `code`."""
    begin = b"\xfc\xbe%c\x7c\xba\xf8\x03\xac\x84\xc0\x74\x03\xee\xeb\xf8"  # lodsb; test al, al; jz; out dx, al; jmp
    return begin % (len(begin) - 1 + len(code)) + code + text + b"\0"


CASES = {
    "no boot sector": (None, "the firmware finds no bootable device: Hard Disk: Boot failed: not a bootable disk"),
    "halted": (HALT, r"the guest hangs: no output and no disk access for \d+\.\d s of its own time; "),
    "in a loop": (LOOP, r"the guest hangs: .*; it runs in a loop at 0000:00007c00"),
    "reset": (RESET, r"the guest reset itself \(a triple fault or a reboot\)"),
    "panic": (PANIC, "the guest panicked"),
}


@pytest.mark.parametrize(("code", "words"), CASES.values(), ids=list(CASES))
def test_what_is_wrong_is_told(tmp_path: Path, code: bytes | None, words: str) -> None:
    image = bootable(tmp_path / "bad.vmdk", code)
    with pytest.raises(GuestError) as caught, boot(image, from_disk=True, log_dir=tmp_path / "logs"):
        pass
    assert re.match(f"guest bad\\.vmdk: waiting for the probe's first line: {words}", str(caught.value))
    assert caught.value.logs == tmp_path / "logs"
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    if code == HALT:
        assert "halted at 0000:00007c02 with interrupts off" in str(caught.value)


def test_a_system_that_loops_with_interrupts_off_hangs_for_good(tmp_path: Path) -> None:
    image = bootable(tmp_path / "bad.vmdk", DEAF_LOOP)
    words = (
        r"the guest hangs: no output and no disk access for (\d+\.\d) s .*; it runs in a loop at .* with interrupts off"
    )
    with pytest.raises(GuestError, match=words) as caught:
        boot(image, expect="login:", log_dir=tmp_path / "logs").__enter__()
    found = re.search(words, str(caught.value))
    assert found is not None
    assert float(found[1]) < 20  # about four; one that may still say something has thirty


def test_a_system_that_an_interrupt_could_wake_is_given_its_time(tmp_path: Path) -> None:
    image = bootable(tmp_path / "bad.vmdk", LOOP)
    with pytest.raises(GuestError, match=r"waiting for 'login:': not in 5 s of the guest's own time"):
        boot(image, expect="login:", seconds=5.0, log_dir=tmp_path / "logs").__enter__()


def test_a_guest_that_talks_but_never_gets_there(tmp_path: Path) -> None:
    image = bootable(tmp_path / "bad.vmdk", CHATTER)
    words = r"waiting for 'login:': not in 1 s of the guest's own time"
    with pytest.raises(GuestError, match=words) as caught:
        boot(image, expect="login:", seconds=1.0, log_dir=tmp_path / "logs").__enter__()
    assert "\n--- serial line, last 12 lines\n...." in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [(b"a login:", None), (b"Kernel panic - not syncing: VFS", "Kernel panic - not syncing: VFS"), (b"oops", "oops")],
)
def test_a_system_of_the_disks_own_is_awaited(tmp_path: Path, text: bytes, wrong: str | None) -> None:
    """The boot sector writes a line to the serial port, and halts."""
    code = b"\xbe\x10\x7c\xba\xf8\x03\xac\x84\xc0\x74\x03\xee\xeb\xf8\xf4\xf4" + text + b"\r\n\0"
    image = bootable(tmp_path / "system.vmdk", code)
    if wrong is None:
        with boot(image, expect="login:") as guest:
            assert guest.boot_seconds > 0
        return
    with pytest.raises(GuestError, match=f"waiting for 'login:': {wrong}"):
        boot(image, expect="login:", failures=[re.compile(b"Kernel panic[^\r]*"), b"oops"]).__enter__()


@pytest.mark.parametrize(
    "use",
    [
        lambda guest: guest.assert_reads(Content("4M")),
        lambda guest: guest.probe.size(),
        lambda guest: guest.power_off(3),
    ],
    ids=["assert_reads", "probe", "status"],
)
def test_what_needs_the_probe_is_refused_where_none_runs(tmp_path: Path, use: Callable[[Machine], object]) -> None:
    image = bootable(tmp_path / "system.vmdk", prompt(LOOP))
    words = "system.vmdk was booted with `expect`: no probe runs there; use `guest.console` and `guest.qmp`$"
    with boot(image, expect="login:") as guest:
        with pytest.raises(InvalidRequest, match=words):
            use(guest)
        assert guest.report is None


def test_the_console_takes_text_as_pexpect_does(tmp_path: Path) -> None:
    image = bootable(tmp_path / "system.vmdk", prompt(ECHO))
    with boot(image, expect="login:") as guest:
        assert guest.console.sendline("root é") == len("root é\n".encode())
        guest.console.expect("ro+t é\n")
        assert guest.console.after == "root é\n".encode()
        assert guest.console.send(b"a.b") == guest.console.send("a.b")
        assert guest.console.expect_exact(["a+b", "a.b"]) == 1
        assert guest.console.expect_exact(b"a.b") == 0


@pytest.mark.parametrize(
    ("wait", "words"),
    [
        (lambda console: console.expect("# ", timeout=0.5), "'# '"),
        (lambda console: console.expect([b"a", re.compile(b"b+")], timeout=0.5), r"'a' or 'b\+'"),
        (lambda console: console.expect_exact("a.b", timeout=0.5), r"'a\.b'"),
    ],
)
def test_a_wait_of_the_tests_own_names_what_it_waits_for(
    tmp_path: Path, wait: Callable[[Console], object], words: str
) -> None:
    image = bootable(tmp_path / "system.vmdk", prompt(ECHO))
    with (
        boot(image, expect="login:", log_dir=tmp_path / "logs") as guest,
        pytest.raises(GuestError, match=rf"^guest system\.vmdk: waiting for {words}: not in 0\.5 s of the guest's own"),
    ):
        wait(guest.console)


def test_a_system_is_switched_off_by_its_power_button(tmp_path: Path) -> None:
    image = bootable(tmp_path / "system.vmdk", prompt(BUTTON))
    with boot(image, expect="login:", log_dir=tmp_path / "logs") as guest:
        guest.power_off()
        assert guest.report is None
    assert '"guest-shutdown"' in (tmp_path / "logs" / "qmp.log").read_text()


def test_a_system_that_ignores_its_power_button(tmp_path: Path) -> None:
    image = bootable(tmp_path / "system.vmdk", prompt(HALT))
    words = "waiting for the guest to switch off, its power button pressed: the guest hangs: .* with interrupts off"
    with boot(image, expect="login:", log_dir=tmp_path / "logs") as guest, pytest.raises(GuestError, match=words):
        guest.power_off()


def test_uefi_boots_the_disks_own_system_too(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """There is none: the firmware says of the disk that it cannot be booted, which is what is awaited here."""
    if not list(Path("/usr/share").glob("*/**/OVMF_CODE*.fd")) and pytestconfig.getoption("--require") == "none":
        pytest.skip("OVMF is not installed")
    image = bootable(tmp_path / "bad.vmdk", LOOP)
    with boot(image, uefi=True, expect=r'BdsDxe: failed to load Boot\d+ "[^"]+"', memory_mib=128) as guest:
        assert guest.found is not None
        assert b"HARDDISK" in guest.found[0]
    words = r'waiting for \'login:\': the firmware finds nothing to boot: failed to load Boot\d+ "[^"]*HARDDISK'
    with pytest.raises(GuestError, match=words):
        boot(image, uefi=True, expect="login:", memory_mib=128, log_dir=tmp_path / "logs").__enter__()


SHELL = b"UEFI Interactive Shell v2.2\r\nMapping table\r\n BLK0: Alias(s):\r\n"
ASKS = b"Press ESC in 5 seconds to skip startup.nsh"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b'BdsDxe: failed to load Boot0001 "DVD": Not Found\r\nlogin:', True),
        (b'BdsDxe: failed to load Boot0001 "DVD": Not Found\r\nBdsDxe: No bootable option or device was found.', False),
        (b'BdsDxe: failed to load Boot0001 "DVD": Not Found\r\n' + SHELL + ASKS, False),
        (b'BdsDxe: failed to load Boot0001 "DVD": Not Found\r\n' + SHELL + b" FS0:\r\n" + ASKS + b"\r\nShell> ", False),
        (SHELL + b" FS0:\r\n" + ASKS + b"\r\nlogin:", True),
    ],
    ids=["another option", "no option", "shell", "shell without script", "script"],
)
def test_a_uefi_that_may_start_a_system_yet_is_given_its_time(tmp_path: Path, text: bytes, found: bool) -> None:
    image = bootable(tmp_path / "system.vmdk", prompt(LOOP, text))
    machine = boot(image, expect="login:", failures=[b"other"], log_dir=tmp_path / "logs")
    if found:
        with machine as guest:
            assert guest.found is not None
        return
    words = r'the firmware finds nothing to boot: failed to load Boot0001 "DVD": Not Found \(logs'
    with pytest.raises(GuestError, match=words):
        machine.__enter__()


def test_the_shell_of_the_firmware_can_be_awaited(tmp_path: Path) -> None:
    image = bootable(tmp_path / "system.vmdk", prompt(LOOP, SHELL + ASKS + b"\r\nShell> "))
    with boot(image, expect="Shell> ") as guest:
        assert guest.found is not None


def test_qemu_that_dies_while_it_boots(tmp_path: Path) -> None:
    image = bootable(tmp_path / "bad.vmdk", CHATTER)
    pid, said = tmp_path / "pid", tmp_path / "logs" / "serial.log"
    machine = boot(image, expect="never", seconds=100, log_dir=said.parent, qemu_args=["-pidfile", str(pid)])

    def kill() -> None:
        while not ended.is_set() and not (said.exists() and said.stat().st_size):
            time.sleep(0.01)
        if not ended.is_set():
            os.kill(int(pid.read_text()), signal.SIGKILL)

    ended, killer = threading.Event(), threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(GuestError, match=r"waiting for 'never': QEMU ended with -9: no output"):
            machine.__enter__()
    finally:
        ended.set()
        killer.join()


def test_a_guest_that_stops_answering(tmp_path: Path) -> None:
    image = bootable(tmp_path / "a.vmdk", None)
    with boot(image, log_dir=tmp_path / "logs") as guest:
        guest.qmp("stop")
        with pytest.raises(GuestError) as caught:
            guest.probe.size()
    assert "waiting for the answer to 'size': the guest hangs" in str(caught.value)
    assert str(caught.value).endswith(f"QEMU says that it is paused (logs: {tmp_path / 'logs'})")


@pytest.mark.parametrize("hold", [False, True])
def test_a_qemu_that_a_signal_has_stopped_is_called_that(tmp_path: Path, hold: bool) -> None:
    image = bootable(tmp_path / "a.vmdk", None)
    with boot(image, log_dir=tmp_path / "logs", hold=hold) as guest:
        os.kill(guest.pid, signal.SIGSTOP)
        with pytest.raises(GuestError) as caught:
            guest.probe.size()
        words = f"waiting for the answer to 'size': a signal has stopped QEMU, process {guest.pid}, as kill -STOP does"
        assert caught.value.reason == words
        assert guest.report is not None
        assert guest.report.qemu_chain.startswith("QEMU is stopped by a signal\n")
        assert "query-status" not in guest.report.qmp


def test_the_report_has_all_there_is(tmp_path: Path) -> None:
    bootable(tmp_path / "base.vmdk", PANIC)
    create_overlay(tmp_path / "top.vmdk", tmp_path / "base.vmdk", durable=False)
    with pytest.raises(GuestError) as caught, boot(tmp_path / "top.vmdk", from_disk=True, log_dir=tmp_path / "logs"):
        pass
    (report,) = caught.value.__notes__
    assert report == (tmp_path / "logs/report.txt").read_text().rstrip("\n")
    for words in (
        "Booting from 0000:7c00\n--- standard error of QEMU\n",
        '"event": "GUEST_PANICKED"',
        f"\n0  {tmp_path}/top.vmdk  monolithicSparse, 4 MiB, CID ",
        "(base.vmdk)\n1  ",
        f"  {tmp_path}/base.vmdk  vmdk, 4 MiB\n",
        "QEMU HARDDISK ATA-7 Hard-Disk (4 MiBytes)",
        f"--- logs: {tmp_path / 'logs'}",
    ):
        assert words in report
    shown = "".join(traceback.format_exception(caught.value))
    assert shown.count("Traceback") == 1


def test_the_command_of_the_report_runs_again(tmp_path: Path) -> None:
    image = bootable(tmp_path / "a.vmdk", PANIC)
    before = image.read_bytes()
    with pytest.raises(GuestError), boot(image, from_disk=True, writable=True, log_dir=tmp_path / "logs"):
        pass
    command = (tmp_path / "logs/command").read_text()
    assert command.strip() in (tmp_path / "logs/report.txt").read_text()
    with subprocess.Popen(
        shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as qemu:
        assert qemu.stderr is not None
        while b"Booting from 0000:7c00" not in (line := qemu.stderr.readline()):
            assert line
        qemu.send_signal(signal.SIGTERM)
    assert image.read_bytes() == before


def test_a_guest_that_is_held_goes_on(tmp_path: Path) -> None:
    image = bootable(tmp_path / "bad.vmdk", HALT)
    with pytest.raises(GuestError) as caught, boot(image, from_disk=True, log_dir=tmp_path / "logs", hold=True):
        pass
    told = caught.value.__notes__[-1]
    pid = int(re.search(r"kill (\d+)$", told)[1])  # type: ignore[index]
    try:
        sockets = [Path(path) for path in re.findall(r"UNIX-CONNECT:(\S+);", told)]
        assert [path.name for path in sockets] == ["console", "monitor"]
        assert all(path.is_socket() for path in sockets)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        shutil.rmtree(sockets[0].parent)


def test_on_the_command_line_it_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    image = bootable(tmp_path / "bad.vmdk", None)
    assert main(["guest", "boot", "--from-disk", str(image)]) == 71
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("qemu-vmdk-snap: guest bad.vmdk: waiting for the probe's first line: the firmware finds no ")


def test_a_probe_that_is_well_leaves_no_report(tmp_path: Path) -> None:
    image = bootable(tmp_path / "a.vmdk", None)
    with open_chain(image, writable=True) as chain:
        chain.write_at(0, disk_image())
    with boot(image, from_disk=True, log_dir=tmp_path / "logs") as guest:
        guest.power_off()
        assert guest.report is None
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {
        *("command", "firmware.log", "qmp.log", "serial.log", "stderr.log")
    }
