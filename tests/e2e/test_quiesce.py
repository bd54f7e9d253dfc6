"""Snapshots of a Linux guest whose agent freezes its file systems: is what they hold clean, and does it thaw again?

The guest (guests/linux) counts: each number goes to the next sector of a file, is made durable, and is then told on its
serial port. A mounted ext4 has the flag `needs_recovery` in its superblock, and a frozen one has not: what was frozen
can be mounted as it is, and what was only stopped needs its journal.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from guests.linux import build
from qemu_vmdk_snap import create_image, open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain.connect import open_connection
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.dropins import dropin
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.journal.recover import recover
from qemu_vmdk_snap.domain.qemu.agent import _is_silence
from qemu_vmdk_snap.domain.qemu.monitor import Monitor
from qemu_vmdk_snap.domain.revert.run import revert
from qemu_vmdk_snap.errors import DomainError
from tests.domain.libvirtd import Daemon

if TYPE_CHECKING:
    import libvirt

pytestmark = [
    pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64", "mke2fs", "debugfs", "e2fsck"),
    pytest.mark.timeout(300),
]
EXAMPLES: Final = Path(__file__).parents[2] / "examples" / "hooks.d"
SIZE: Final = 16 << 20
SLOTS: Final = 64
NEEDS_RECOVERY: Final = 4  # EXT4_FEATURE_INCOMPAT_RECOVER
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def linux(pytestconfig: pytest.Config) -> build.Guest:
    """Return the guest's kernel and initramfs, which the first test makes of the distribution's packages."""
    try:
        return build.build()
    except build.BuildError as error:
        if pytestconfig.getoption("--require") == "none":
            pytest.skip(f"no Linux guest: {error}")
        pytest.fail(f"required: the Linux guest: {error}", pytrace=False)


class Guest:
    """A domain of the daemon with Linux in it, counting."""

    def __init__(self, daemon: Daemon, folder: Path, linux: build.Guest) -> None:
        self.daemon, self.folder, self.name = daemon, folder, "linux"
        file_system(folder)
        self.conn = open_connection(daemon.uri)
        self.domain: libvirt.virDomain = self.conn.defineXML(domain_xml(self.name, folder, linux))
        self.start()

    def start(self) -> None:
        """Boot, and wait until the agent answers and the guest counts."""
        (self.folder / "console").unlink(missing_ok=True)
        self.domain.create()
        wait(lambda: self.agent_answers() and self.told > 2, self.console)

    def console(self) -> str:
        """Return what the guest has said."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "console").read_text(errors="replace")
        return "nothing said"

    @property
    def told(self) -> int:
        """The last number of which the guest has said that it is durable."""
        return max((int(number) for number in re.findall(r"guest: wrote (\d+)\s", self.console())), default=0)

    def counts(self) -> None:
        """Return when the guest has counted on from here."""
        told = self.told
        wait(lambda: self.told > told + 3, self.console)
        assert "guest: a write has failed" not in self.console()

    def ask(self, command: str, seconds: int = 60) -> object:
        """Return what the agent answers."""
        import libvirt_qemu

        line = json.dumps({"execute": command})
        return json.loads(libvirt_qemu.qemuAgentCommand(self.domain, line, seconds, 0))["return"]

    def agent_answers(self) -> bool:
        import libvirt

        try:
            self.ask("guest-ping", 5)
        except libvirt.libvirtError:
            return False
        return True

    def shell(self, line: str) -> int:
        """Let the guest's shell run a line, and return its exit status when it has."""
        number, said = next(_numbers), b""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(100)
            connection.connect(str(self.folder / "shell"))
            connection.sendall(f"{line}; echo done-{number}-$?\n".encode())
            # The line itself comes back first, with `$?` for the status.
            while (status := re.search(rb"done-%d-(\d+)\s" % number, said)) is None:
                said += (more := connection.recv(100))
                assert more, said
        return int(status[1])

    def stands_still(self) -> None:
        """Return when the frozen guest's counter waits for the thaw, and all that it has said has come out."""
        number = next(_numbers)
        # An open (2, 257) or a write (1) that nothing interrupts: only on a frozen file system it stays that.
        look = "$(cat $p/syscall 2>/dev/null) $(cat $p/stat 2>/dev/null)"
        cases = "|".join(f'"{call} "*") D "*' for call in (1, 2, 257))
        loop = f'while :; do for p in /proc/[0-9]*; do case "{look}" in {cases}) break 2;; esac; done; sleep 0.1; done'
        assert self.shell(f"{loop}; echo 'guest: frozen {number}' >/dev/ttyS0") == 0
        wait(lambda: f"guest: frozen {number}" in self.console(), self.console)

    def state(self) -> tuple[str, list[str], int, list[str]]:
        """Return what a refused snapshot leaves as it was."""
        import libvirt

        files = sorted(path.name for path in self.folder.glob("*.vmdk"))
        nodes = sorted(Monitor(self.domain).nodes())
        return self.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE), files, self.domain.snapshotNum(), nodes

    def runs_as(self, before: tuple[str, list[str], int, list[str]]) -> None:
        """Check that nothing has changed, nothing is left unfinished, and the guest goes on."""
        assert self.state() == before
        assert self.domain.UUIDString() not in IntentStore.of(self.conn).uuids()
        assert self.domain.state()[0] == 1
        self.counts()

    @property
    def top(self) -> Path:
        """The file that the guest writes to."""
        found = re.search(r"<source file='(.*?)'", self.domain.XMLDesc(2))
        assert found is not None
        return Path(found[1])

    def renew(self) -> None:
        """Boot again where the last test left no guest whose agent answers."""
        if not self.domain.isActive() or not self.agent_answers():
            if self.domain.isActive():
                self.domain.destroy()
            self.start()

    def close(self) -> None:
        import libvirt

        if self.domain.isActive():
            self.domain.destroy()
        self.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
        self.conn.close()


def wait(until: object, told: object, seconds: float = 120) -> None:
    assert callable(until)
    assert callable(told)
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, f"waited for {seconds} s; the guest said: {told()[-3000:]}"
        time.sleep(0.05)


def file_system(folder: Path) -> Path:
    """Return a new VMDK disk of ours with an empty ext4 on it."""
    raw, path = folder / "ext4.raw", folder / "data.vmdk"
    with raw.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", raw], check=True, timeout=60)
    create_image(path, SIZE, durable=False)
    with open_chain(path, writable=True) as chain, raw.open("rb") as file:
        for at in range(0, SIZE, 1 << 16):
            if any(piece := file.read(1 << 16)):
                chain.write_at(at, piece)
    raw.unlink()
    return path


def domain_xml(name: str, folder: Path, linux: build.Guest) -> str:
    return f"""<domain type='qemu'><name>{name}</name><memory unit='MiB'>192</memory>
      <os><type arch='x86_64' machine='pc'>hvm</type>
        <kernel>{linux.kernel}</kernel><initrd>{linux.initrd}</initrd>
        <cmdline>console=ttyS0 quiet panic=-1</cmdline></os>
      <features><acpi/></features>
      <devices><emulator>/usr/bin/qemu-system-x86_64</emulator><memballoon model='none'/>
        <disk type='file' device='disk'><driver name='qemu' type='vmdk'/><source file='{folder}/data.vmdk'/>
          <target dev='vda' bus='virtio'/></disk>
        <channel type='unix'><source mode='bind' path='{folder}/agent'/>
          <target type='virtio' name='org.qemu.guest_agent.0'/></channel>
        <serial type='file'><source path='{folder}/console'/><target port='0'/></serial>
        <serial type='unix'><source mode='bind' path='{folder}/shell'/><target port='1'/></serial>
      </devices></domain>"""


@pytest.fixture(scope="module")
def one_guest(the_daemon: Daemon, scratch_root: Path, linux: build.Guest) -> Iterator[Guest]:
    folder = scratch_root / "quiesce"
    folder.mkdir(mode=0o711)
    guest = Guest(the_daemon.ensure(), folder, linux)
    yield guest
    guest.close()
    shutil.rmtree(folder)


@pytest.fixture
def guest(daemon: Daemon, one_guest: Guest, monkeypatch: pytest.MonkeyPatch) -> Guest:
    """Return the guest that all tests share, for booting it takes longer than a test; the agent answers."""
    assert daemon is one_guest.daemon
    monkeypatch.setattr("qemu_vmdk_snap.domain.qemu.agent.PING_SECONDS", 60)  # the machine may have much else to do
    one_guest.renew()
    return one_guest


@pytest.fixture
def name() -> str:
    """Return a name for a snapshot that no other test takes."""
    return f"s{next(_numbers)}"


# --- what is on a disk ------------------------------------------------------------------------------------------------


def needs_recovery(path: Path) -> bool:
    """Return whether the ext4 on an image needs its journal, by its superblock."""
    with open_chain(path, lock=False) as chain:
        superblock = chain.read_at(1024, 1024)
    assert superblock[0x38:0x3A] == b"\x53\xef"
    return bool(int.from_bytes(superblock[0x60:0x64], "little") & NEEDS_RECOVERY)


def numbers(path: Path) -> list[int]:
    """Return the numbers in the counter's file as they are on an image, the journal left aside; 0 where none is."""
    raw = path.with_suffix(".raw")
    with open_chain(path, lock=False) as chain, raw.open("wb") as file:
        for at in range(0, SIZE, 1 << 16):
            file.write(chain.read_at(at, 1 << 16))
    words = ["debugfs", "-R", "cat /counter", str(raw)]
    data = subprocess.run(words, capture_output=True, check=True, timeout=60).stdout
    return [int(data[at : at + 512].replace(b"\0", b" ").strip() or b"0") for at in range(0, len(data), 512)]


def is_clean(path: Path) -> bool:
    """Return whether e2fsck, which may repair nothing, finds nothing to say about the raw copy that `numbers` made."""
    words = ["e2fsck", "-n", "-f", str(path.with_suffix(".raw"))]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode in (0, 4), done.stdout + done.stderr
    return not done.returncode and "skipping journal recovery" not in done.stdout + done.stderr


def check_counted(path: Path, at_least: int, at_most: int) -> None:
    """Check that the file holds the last numbers up to one between both, each in its sector."""
    found = numbers(path)
    last = max(found)
    assert at_least <= last <= at_most
    wanted = {number % SLOTS: number for number in range(max(1, last - SLOTS + 1), last + 1)}
    assert {slot: number for slot, number in enumerate(found) if number} == wanted


@dataclass
class Moment:
    """How the guest was when QEMU was asked to go over to the overlays."""

    status: list[object] = field(default_factory=list)
    told: list[tuple[int, int]] = field(default_factory=list)
    """What it had counted to, then and later: half a second where it is frozen, else once it has counted on."""
    counts: bool = True
    """Whether there is a counter that runs, or waits for the thaw."""


@pytest.fixture
def moment(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> Moment:
    """Look at the guest in the middle of a live snapshot."""
    seen, real = Moment(), Monitor.execute

    def execute(self: Monitor, command: str, **arguments: Any) -> object:  # noqa: ANN401 # as the real one
        if command == "transaction":
            seen.status.append(guest.ask("guest-fsfreeze-status"))
            frozen = seen.status[-1] == "frozen"
            if frozen and seen.counts:
                guest.stands_still()
            told = guest.told
            if frozen:
                time.sleep(0.6)
            else:
                wait(lambda: guest.told > told, guest.console)
            seen.told.append((told, guest.told))
        return real(self, command, **arguments)

    monkeypatch.setattr(Monitor, "execute", execute)
    return seen


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quiesce", ["require", "auto"])
def test_a_quiesced_snapshot_holds_a_clean_file_system(guest: Guest, moment: Moment, name: str, quiesce: str) -> None:
    disk = guest.top
    report = create_snapshot(guest.conn, guest.name, name, quiesce=quiesce)
    assert moment.status == ["frozen"]
    assert moment.told[0][0] == moment.told[0][1]
    assert report.pause is not None
    assert report.pause.frozen is not None
    assert report.pause.frozen > 500
    assert report.notes == ()
    assert guest.ask("guest-fsfreeze-status") == "thawed"
    guest.counts()
    assert not needs_recovery(disk)
    # All that the guest was told is durable is there, without the journal.
    check_counted(disk, moment.told[0][1], moment.told[0][1] + 1)
    assert is_clean(disk)
    assert needs_recovery(guest.top)


def test_a_snapshot_that_is_not_quiesced_needs_its_journal(guest: Guest, moment: Moment, name: str) -> None:
    """The control: without it the tests above would pass with a guest that is never dirty."""
    disk = guest.top
    report = create_snapshot(guest.conn, guest.name, name)
    assert moment.status == ["thawed"]
    assert moment.told[0][0] < moment.told[0][1]
    assert report.pause is not None
    assert report.pause.frozen is None
    assert needs_recovery(disk)
    numbers(disk)
    assert not is_clean(disk)


@pytest.mark.parametrize("quiesce", ["require", "no"])
def test_what_a_guest_finds_that_is_reverted(guest: Guest, name: str, quiesce: str) -> None:
    create_snapshot(guest.conn, guest.name, name, quiesce=quiesce)
    guest.domain.destroy()
    revert(guest.conn, guest.name, name)
    guest.start()
    assert "mounted filesystem" in guest.console()
    assert ("recovery complete" in guest.console()) is (quiesce == "no")


def test_an_idle_guest_whose_overlay_is_first_written_by_freezing(guest: Guest, moment: Moment, name: str) -> None:
    """Freezing writes the superblock, and QEMU then a new CID, which the overlay must follow: a second try."""
    moment.counts = False
    guest.shell("kill -STOP $(cat /run/writer)")
    first = guest.top
    create_snapshot(guest.conn, guest.name, name, quiesce="require")
    second = guest.top
    create_snapshot(guest.conn, guest.name, f"{name}-again", quiesce="require")
    assert moment.status == ["frozen", "frozen"]
    assert not needs_recovery(first)
    assert not needs_recovery(second)
    guest.shell("kill -CONT $(cat /run/writer)")
    guest.counts()


def test_a_transaction_that_qemu_refuses_leaves_the_guest_thawed(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before, real, seen = guest.state(), Monitor.execute, []

    def execute(self: Monitor, command: str, **arguments: Any) -> object:  # noqa: ANN401 # as the real one
        if command == "transaction":
            seen.append(guest.ask("guest-fsfreeze-status"))
            bad = {"type": "blockdev-snapshot", "data": {"node": "no-such-node", "overlay": "no-such-node"}}
            arguments["actions"] = [*arguments["actions"], bad]
        return real(self, command, **arguments)

    with monkeypatch.context() as broken:
        broken.setattr(Monitor, "execute", execute)
        with pytest.raises(DomainError, match=r"QEMU refuses transaction: .*no-such-node"):
            create_snapshot(guest.conn, guest.name, name, quiesce="require")
    assert seen == ["frozen"]
    assert guest.ask("guest-fsfreeze-status") == "thawed"
    guest.runs_as(before)
    create_snapshot(guest.conn, guest.name, name, quiesce="require")


@pytest.mark.parametrize(("code", "silent"), [(86, True), (112, True), (113, False), (1, False)])
def test_what_libvirt_says_of_an_answer_that_does_not_come(code: int, silent: bool) -> None:
    import libvirt

    error = libvirt.libvirtError("told")
    error.err = (code, 0, "told", 2, "", None, None, -1, -1)
    assert _is_silence(error) == silent


@pytest.mark.parametrize("quiesce", ["require", "auto"])
def test_a_freeze_that_comes_too_late_is_thawed(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, name: str, quiesce: str
) -> None:
    """The agent's own hook takes longer than we wait: it freezes when nobody expects it any more."""
    guest.shell("echo '[ $1 = thaw ] || sleep 2' >>/run/hook")
    monkeypatch.setattr("qemu_vmdk_snap.domain.qemu.agent.FREEZE_SECONDS", 1)
    before = guest.state()
    with pytest.raises(DomainError, match="cannot be frozen") if quiesce == "require" else contextlib.nullcontext():
        report = create_snapshot(guest.conn, guest.name, name, quiesce=quiesce)
        assert "its file systems cannot be frozen" in report.notes[0]
    wait(guest.agent_answers, guest.console)
    assert guest.ask("guest-fsfreeze-status") == "thawed"
    guest.counts()
    if quiesce == "require":
        guest.runs_as(before)
    guest.shell("echo '#!/bin/sh' >/run/hook")


@pytest.mark.parametrize("quiesce", ["no", "auto"])
def test_the_freezing_example_freezes_this_guest(
    guest: Guest, moment: Moment, monkeypatch: pytest.MonkeyPatch, name: str, quiesce: str
) -> None:
    """With `--quiesce` as well, the agent refuses to freeze twice: what the drop-in froze is left to it."""
    folder = guest.folder / "hooks.d"
    folder.mkdir(mode=0o755, exist_ok=True)
    (folder / "10-freeze").write_bytes((EXAMPLES / "10-freeze-filesystems").read_bytes())
    (folder / "10-freeze").chmod(0o755)
    monkeypatch.setenv(dropin.FOLDER_VARIABLE, str(folder))
    disk = guest.top
    report = create_snapshot(guest.conn, guest.name, name, quiesce=quiesce)
    assert moment.status == ["frozen"]
    assert moment.told[0][0] == moment.told[0][1]
    assert guest.ask("guest-fsfreeze-status") == "thawed"
    guest.counts()
    check_counted(disk, moment.told[0][1], moment.told[0][1] + 1)
    assert is_clean(disk)
    assert not needs_recovery(disk)
    assert len(report.notes) == (quiesce == "auto")


KILLED = """
import os, signal, sys
from qemu_vmdk_snap.domain.connect import open_connection
from qemu_vmdk_snap.domain.qemu import agent
from qemu_vmdk_snap.domain.qemu.monitor import Monitor
from qemu_vmdk_snap.domain.create.run import create_snapshot

agent.PING_SECONDS = 60
real = Monitor.execute
Monitor.execute = lambda self, word, **more: (
    os.kill(os.getpid(), signal.SIGKILL) if word == "transaction" else real(self, word, **more)
)
create_snapshot(open_connection(sys.argv[1]), sys.argv[2], sys.argv[3], quiesce="require")
"""


def test_a_command_that_is_killed_while_the_guest_is_frozen(guest: Guest, name: str) -> None:
    words = [sys.executable, "-c", KILLED, guest.daemon.uri, guest.name, name]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert guest.ask("guest-fsfreeze-status") == "frozen"
    assert recover(guest.conn, [guest.name])
    assert guest.ask("guest-fsfreeze-status") == "thawed"
    guest.counts()


def test_an_interruption_while_the_agent_freezes(guest: Guest, name: str) -> None:
    """Python raises it when libvirt has let go, and the guest is frozen then."""
    waits = "until [ -e /run/go ]; do sleep 0.1; done"
    guest.shell(f"echo '[ $1 = thaw ] || {{ : >/run/freezing; {waits}; }}' >>/run/hook")
    before = guest.state()
    words = [sys.executable, "-m", "qemu_vmdk_snap", "snapshot", "create", "-c", guest.daemon.uri, guest.name, name]
    with subprocess.Popen([*words, "--quiesce"], stderr=subprocess.PIPE, text=True) as process:
        wait(lambda: guest.shell("[ -e /run/freezing ]") == 0, guest.console)
        process.terminate()
        guest.shell(": >/run/go")
        said = process.communicate(timeout=100)[1]
    assert process.returncode > 0, said
    assert guest.ask("guest-fsfreeze-status") == "thawed"
    guest.runs_as(before)
    guest.shell("echo '#!/bin/sh' >/run/hook; rm /run/go /run/freezing")


def test_what_cannot_be_thawed_is_told(guest: Guest, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The agent is killed while all is frozen; one that is started again thaws when it is asked to."""
    monkeypatch.setattr("qemu_vmdk_snap.domain.qemu.agent.THAW_SECONDS", 1)
    real = Monitor.execute

    def execute(self: Monitor, command: str, **arguments: Any) -> object:  # noqa: ANN401 # as the real one
        if command == "transaction":
            guest.stands_still()
            guest.shell("killall -KILL qemu-ga")
        return real(self, command, **arguments)

    monkeypatch.setattr(Monitor, "execute", execute)
    report = create_snapshot(guest.conn, guest.name, name, quiesce="require")
    assert "its file systems could not be thawed: " in report.notes[0]
    told = guest.told
    guest.shell("qemu-ga -d -m virtio-serial -p /dev/vport*p1 -t /run -F/run/hook")
    wait(guest.agent_answers, guest.console)
    assert guest.told == told
    assert guest.ask("guest-fsfreeze-status") == "frozen"
    guest.domain.fsThaw()
    guest.counts()


def test_a_thaw_by_somebody_else_is_told(guest: Guest, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = Monitor.execute

    def execute(self: Monitor, command: str, **arguments: Any) -> object:  # noqa: ANN401 # as the real one
        if command == "transaction":
            guest.domain.fsThaw()
        return real(self, command, **arguments)

    monkeypatch.setattr(Monitor, "execute", execute)
    report = create_snapshot(guest.conn, guest.name, name, quiesce="require")
    assert report.notes == ("its file systems were thawed too early, by something else: the snapshot may not be clean",)
    guest.counts()


def test_a_paused_guest_cannot_be_frozen(guest: Guest, name: str) -> None:
    guest.domain.suspend()
    with pytest.raises(DomainError, match="it is paused, and so is its agent"):
        create_snapshot(guest.conn, guest.name, name, quiesce="require")
    guest.domain.resume()
    guest.counts()


@pytest.mark.parametrize(("death", "reason"), [("STOP", "respond"), ("KILL", "is not connected")])
def test_an_agent_that_is_dead(
    guest: Guest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    death: str,
    reason: str,
) -> None:
    """One that hangs is given up, which libvirt's own command never does."""
    monkeypatch.setattr("qemu_vmdk_snap.domain.qemu.agent.PING_SECONDS", 1)
    guest.shell(f"killall -{death} qemu-ga")
    if death == "KILL":
        wait(lambda: not guest.agent_answers(), guest.console)
    words = ["snapshot", "create", "-c", guest.daemon.uri, guest.name]
    before = guest.state()
    assert main([*words, name, "--quiesce=require"]) != 0
    told = capsys.readouterr().err
    assert f"domain {guest.name}: its file systems cannot be frozen: " in told
    assert reason in told
    guest.runs_as(before)
    disk = guest.top
    assert main([*words, name, "--quiesce=auto"]) == 0
    told = capsys.readouterr().err
    assert f"domain {guest.name}: its file systems cannot be frozen: " in told
    assert reason in told
    guest.counts()
    assert needs_recovery(disk)
    if death == "STOP":  # what it was asked meanwhile does no harm when it goes on
        guest.shell("killall -CONT qemu-ga")
        wait(guest.agent_answers, guest.console)
        assert guest.ask("guest-fsfreeze-status") == "thawed"
        guest.counts()
