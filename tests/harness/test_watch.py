"""Does the watch over a guest see what there is to see, and count the guest's own time alone?"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_vmdk_snap import create_image
from qemu_vmdk_snap.errors import GuestError, InvalidRequest
from qemu_vmdk_snap.harness.deadlines import VARIABLE, timeout_scale
from qemu_vmdk_snap.harness.hardware import Channels, Disk, Setup, arguments, by_hand
from qemu_vmdk_snap.harness.watch.clock import GuestClock
from qemu_vmdk_snap.harness.watch.console import bad_news
from qemu_vmdk_snap.harness.watch.qmp import Qmp
from qemu_vmdk_snap.harness.watch.report import FailureReport, tail

SPIN = "while True: pass"
SECONDS = 0.4


@pytest.fixture
def spinning() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", SPIN]) as process:
        yield process
        process.kill()


def own_share(pid: int) -> float:
    """Return which part of the time that passes is the process's own."""
    began, clock = time.monotonic(), GuestClock(pid)
    time.sleep(SECONDS)
    own = clock.tick()
    return own / (time.monotonic() - began)


def until_it_runs(pid: int) -> None:
    """Return when the process has had a while of a processor: it spins by then."""
    while float(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) < 0.1e9:
        time.sleep(0.01)


def test_time_that_a_process_runs_is_its_own(spinning: subprocess.Popen[bytes]) -> None:
    until_it_runs(spinning.pid)
    assert 0 < own_share(spinning.pid) <= 1


def test_time_that_it_sleeps_is_its_own() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "print('up', flush=True); import time; time.sleep(600)"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.1)
        share = own_share(process.pid)
        process.kill()
    assert share > 0.8


def test_time_that_it_waits_for_a_processor_is_not(spinning: subprocess.Popen[bytes]) -> None:
    """Three processes share one processor: each has a third of the time, or less where others run there too."""
    processor = {min(os.sched_getaffinity(0))}
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(2)]
    for process in (spinning, *others):
        os.sched_setaffinity(process.pid, processor)
    try:
        for process in (spinning, *others):
            until_it_runs(process.pid)
        assert own_share(spinning.pid) < 0.7
    finally:
        for process in others:
            process.kill()
            process.wait()


def test_a_process_that_is_gone_has_time_all_the_same() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert own_share(process.pid) > 0


@pytest.mark.parametrize("text", ["0", "-1", "x", "nan", "inf", ""])
def test_a_scale_that_is_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(InvalidRequest, match=f"{VARIABLE}: {text!r} is not a positive number"):
        timeout_scale()


# ---- the monitor -----------------------------------------------------------------------------------------------------


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[tuple[Qmp, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.sendall(b'{"QMP": {}}\n')
    qmp = Qmp(ours, "d.vmdk", tmp_path / "qmp.log")
    yield qmp, theirs
    qmp.close()
    theirs.close()


def say(channel: socket.socket, *messages: object) -> None:
    channel.sendall(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))


def test_answers_and_events_come_in_any_order(monitor: tuple[Qmp, socket.socket], tmp_path: Path) -> None:
    qmp, theirs = monitor
    late = qmp.send("query-block")
    say(theirs, {"event": "STOP"}, {"return": {"a": 1}, "id": late + 1}, {"return": [], "id": late})
    assert qmp("query-status") == {"a": 1}
    assert (qmp.take(late), qmp.take(late)) == ([], None)
    assert [event["event"] for event in qmp.events] == ["STOP"]
    log = (tmp_path / "qmp.log").read_text().splitlines()
    assert log[0] == '-> {"execute": "qmp_capabilities", "id": 1}'
    assert log[-1] == '<- {"return": [], "id": 2}'


def test_a_refused_command(monitor: tuple[Qmp, socket.socket]) -> None:
    qmp, theirs = monitor
    say(theirs, {"error": {"class": "GenericError", "desc": "no such device"}, "id": 2})
    with pytest.raises(GuestError, match=r"^guest d\.vmdk: QMP eject: no such device$"):
        qmp("eject", {"id": "x"})


def test_a_monitor_that_does_not_answer_or_is_gone(monitor: tuple[Qmp, socket.socket]) -> None:
    qmp, theirs = monitor
    with pytest.raises(GuestError, match=r"QMP stop: no answer in 0\.05 s"):
        qmp("stop", seconds=0.05)
    theirs.close()
    with pytest.raises(GuestError, match="QMP cont: QEMU has closed its monitor"):
        qmp("cont")


@pytest.mark.parametrize(
    ("event", "news"),
    [
        ({"event": "GUEST_PANICKED", "data": {}}, "the guest panicked"),
        ({"event": "WATCHDOG"}, "the guest's watchdog ran out"),
        ({"event": "SHUTDOWN", "data": {"reason": "guest-reset"}}, "the guest reset itself"),
        ({"event": "SHUTDOWN", "data": {"reason": "subsystem-reset"}}, "QEMU ended: subsystem-reset"),
        (
            {"event": "BLOCK_IO_ERROR", "data": {"action": "stop", "operation": "write", "reason": "EIO"}},
            "QEMU stopped",
        ),
        ({"event": "BLOCK_IO_ERROR", "data": {"action": "report"}}, None),
        ({"event": "RESUME"}, None),
    ],
)
def test_events_that_end_a_guest(event: dict[str, object], news: str | None) -> None:
    found = bad_news(event)
    assert found is None if news is None else found is not None and found.startswith(news)


# ---- QEMU's arguments ------------------------------------------------------------------------------------------------


def test_the_command_by_hand_inherits_nothing_and_writes_no_image(tmp_path: Path) -> None:
    setup = Setup(Path("a,b.vmdk"), writable=True, disks=(Disk(Path("c.raw"), "raw", True),))
    words = by_hand(setup, tmp_path)
    assert not [word for word in words if "fd=" in word]
    assert [word.endswith(",snapshot=on") for word in words if word.startswith("if=none")] == [True, True]
    assert any("a,,b.vmdk" in word for word in words)
    assert "snapshot=on" not in " ".join(arguments(setup, tmp_path, Channels(3, 4)))


def test_disks_are_attached_in_turn(tmp_path: Path) -> None:
    disks = (Disk(Path("b.vmdk")), Disk(Path("c.vmdk")))
    words = arguments(Setup(Path("a.vmdk"), disks=disks), tmp_path, Channels(3, 4))
    assert [word for word in words if word.startswith(("ahci", "ide-hd"))] == [
        "ahci,id=ahci",
        "ide-hd,drive=disk,bus=ahci.0",
        "ide-hd,drive=disk1,bus=ahci.1",
        "ide-hd,drive=disk2,bus=ahci.2",
    ]
    with pytest.raises(InvalidRequest, match="disks: 5 are more than the 4 of a machine"):
        Setup(Path("a.vmdk"), disks=(Disk(Path("b.vmdk")),) * 4).validate()


# ---- the report ------------------------------------------------------------------------------------------------------


def test_the_end_of_a_log_is_shown_without_control_characters(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"first\r\n" + b"x" * 500 + b"\r\n\r\n\x1b[31mred\xff\r\n")
    assert tail(tmp_path / "log", lines=2) == "x" * 400 + "...\n\\x1b[31mred\ufffd"
    assert tail(tmp_path / "none") == ""


def test_a_report_has_every_part(tmp_path: Path) -> None:
    report = FailureReport("it hangs", "a", "", "c", "d", "e", "f", "qemu -x", tmp_path)
    text = str(report)
    assert text.startswith("guest report: it hangs\n--- serial line, last 12 lines\na\n--- firmware")
    assert "\n(nothing)\n--- standard error of QEMU\nc\n" in text
    assert text.endswith(f"--- run it again (the image is not written)\nqemu -x\n--- logs: {tmp_path}")


def test_the_folder_of_the_logs_outlives_pickling(tmp_path: Path) -> None:
    error = GuestError("d.vmdk", "it hangs")
    error.logs = tmp_path
    assert str(pickle.loads(pickle.dumps(error))) == f"guest d.vmdk: it hangs (logs: {tmp_path})"


# ---- what is missing -------------------------------------------------------------------------------------------------


def command(words: list[str], code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in an interpreter that runs `code` first."""
    start = f"import sys\n{code}\nfrom qemu_vmdk_snap.cli.main import main\nsys.exit(main({words!r}))"
    kept = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run([sys.executable, "-c", start], env=kept, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", [["guest", "verify", "a.vmdk"], ["guest", "boot", "a.vmdk"], ["demo"]])
def test_without_pexpect_it_says_what_to_install(words: list[str]) -> None:
    done = command(words, "sys.modules['pexpect'] = None")
    assert done.returncode == 70
    assert done.stderr == "qemu-vmdk-snap: pexpect: is not installed (pip install 'qemu-vmdk-snap[harness]')\n"


NO_HOME = """
import os
os.environ.pop("HOME", None)
os.setuid(54321)
from qemu_vmdk_snap.harness import accelerator
accelerator.boot_seconds = lambda name, limit: 0.1 if name == "tcg" else None
accelerator._KVM = "."
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without a name")
@pytest.mark.needs("qemu-system-x86_64")
def test_a_user_without_name_and_home(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch.chmod(0o777)
    monkeypatch.chdir(scratch)
    create_image("a.vmdk", 1 << 20, durable=False)
    Path("a.vmdk").chmod(0o644)
    done = command(["guest", "verify", "a.vmdk"], NO_HOME, TMPDIR=str(scratch))
    assert (done.returncode, done.stderr) == (0, "")
