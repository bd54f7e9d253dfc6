"""Drop-ins: when they run, what they are told, and what their failures do."""

from __future__ import annotations

import http.server
import json
import os
import signal
import threading
from pathlib import Path

import pytest

from qemu_vmdk_snap import InvalidRequest, PluginError
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.dropins import dropin
from tests.domain.lab import Lab, xml_of
from tests.domain.libvirtd import Daemon

EXAMPLES = Path(__file__).parents[3] / "examples" / "hooks.d"
PLAN = {"snapshot": "s1", "disks": [{"target": "vda"}]}


class Folder:
    """A folder of drop-ins that write down how they are called."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.mkdir(mode=0o755)
        self.log = path.parent / "log"
        self.environ = {"PATH": "/usr/bin:/bin", dropin.FOLDER_VARIABLE: str(path)}

    def add(self, name: str, body: str = "") -> Path:
        path = self.path / name
        path.write_text(
            f'#!/bin/sh\n{{ printf "%s " "{name}" "$@" "$LIBVIRT_DEFAULT_URI"; cat; }} >> {self.log}\n{body}\n'
        )
        path.chmod(0o755)
        return path

    def calls(self) -> list[list[str]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.split("{")[0].split() for line in lines]

    def told(self) -> list[dict[str, object]]:
        return [json.loads("{" + line.split("{", 1)[1]) for line in self.log.read_text().splitlines()]

    def run(self, work: Exception | None = None) -> list[str]:
        with dropin.around("create", "d1", PLAN, uri="qemu:///x", environ=self.environ) as notes:
            with self.log.open("a") as log:
                log.write("work {}\n")
            if work is not None:
                raise work
        return notes


@pytest.fixture
def drop(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "hooks.d")


def test_without_a_folder_nothing_runs(tmp_path: Path) -> None:
    with dropin.around("delete", "d1", {}, environ={dropin.FOLDER_VARIABLE: str(tmp_path / "none")}) as notes:
        assert notes == []


def test_before_in_order_and_after_in_the_opposite_one(drop: Folder) -> None:
    drop.add("20-b")
    drop.add("10-a")
    for name in (".hidden", "30-backup~"):
        drop.add(name)
    drop.add("40-not-executable").chmod(0o644)
    assert drop.run() == []
    assert [call[:2] for call in drop.calls()] == [
        ["10-a", "before"],
        ["20-b", "before"],
        ["work"],
        ["20-b", "after"],
        ["10-a", "after"],
    ]
    assert drop.calls()[0] == ["10-a", "before", "create", "d1", "qemu:///x"]
    before, *_, after = drop.told()
    assert before == {"phase": "before", "operation": "create", "domain": "d1", "plan": PLAN}
    assert after == {**before, "phase": "after", "result": "done", "reason": None}


def test_a_failing_before_aborts_with_nothing_done(drop: Folder) -> None:
    drop.add("10-a")
    bad = drop.add("20-b", '[ "$1" = after ] || { echo first; echo the "  reason" >&2; exit 3; }')
    drop.add("30-c")
    with pytest.raises(PluginError) as caught:
        drop.run()
    assert str(caught.value) == f"{bad}: before create: exit status 3: the reason"
    assert [call[:2] for call in drop.calls()] == [
        ["10-a", "before"],
        ["20-b", "before"],
        ["20-b", "after"],
        ["10-a", "after"],
    ]
    assert {told["result"] for told in drop.told()[2:]} == {"aborted"}


def test_a_failure_of_the_work_is_told_and_goes_on(drop: Folder) -> None:
    drop.add("10-a")
    with pytest.raises(ZeroDivisionError):
        drop.run(ZeroDivisionError("no good"))
    assert (drop.told()[-1]["result"], drop.told()[-1]["reason"]) == ("failed", "no good")


def test_a_failing_after_is_only_told(drop: Folder) -> None:
    bad = drop.add("10-a", '[ "$1" = before ] || kill -9 $$')
    drop.add("20-b", '[ "$1" = before ] || exit 1')
    assert drop.run() == [
        f"{drop.path}/20-b: after create: exit status 1: no output",
        f"{bad}: after create: killed by SIGKILL: no output",
    ]


def test_a_deadline_ends_one_with_all_it_has_started(drop: Folder) -> None:
    drop.environ[dropin.DEADLINE_VARIABLE] = "2"
    alive = drop.path.parent / "alive"
    os.mkfifo(alive)
    drop.add("10-a", f'[ "$1" = after ] || {{ exec 9<>{alive}; sleep 300 & sleep 300; }}')
    reader = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(PluginError, match=r"before create: did not end within 2 s"):
        drop.run()
    os.set_blocking(reader, True)
    assert os.read(reader, 1) == b""  # when the last process has ended that holds the other end
    os.close(reader)


def test_one_that_leaves_a_process_behind_holds_up_nobody(drop: Folder) -> None:
    left = drop.path.parent / "left"
    drop.add("10-a", f'[ "$1" = after ] || {{ sleep 300 & echo $! >{left}; }}')
    assert drop.run() == []
    os.kill(int(left.read_text()), signal.SIGKILL)  # it is still there


def test_what_others_may_write_is_not_run(drop: Folder) -> None:
    drop.add("10-a").chmod(0o775)
    with pytest.raises(PluginError, match=r"10-a: may be written by others"):
        drop.run()
    (drop.path / "10-a").chmod(0o755)
    drop.path.chmod(0o777)
    with pytest.raises(PluginError, match=r"hooks\.d: may be written by others"):
        drop.run()
    assert drop.calls() == []


def test_one_that_cannot_be_run_says_why(drop: Folder) -> None:
    path = drop.path / "10-a"
    path.write_text("#!/nowhere/at/all\n")
    path.chmod(0o755)
    with pytest.raises(PluginError, match=r"10-a: cannot be run: No such file or directory"):
        drop.run()


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan"])
def test_a_deadline_must_be_seconds(drop: Folder, text: str) -> None:
    drop.add("10-a")
    drop.environ[dropin.DEADLINE_VARIABLE] = text
    with pytest.raises(InvalidRequest, match="must be a number of seconds"):
        drop.run()


def example(drop: Folder, name: str) -> None:
    path = drop.path / name
    path.write_bytes((EXAMPLES / name).read_bytes())
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("state", "asked"), [("running", ["guest-agent-timeout", "domfsfreeze", "domfsthaw"]), ("shut off", [])]
)
def test_the_freezing_example_freezes_and_thaws_what_runs(
    drop: Folder, tmp_path: Path, state: str, asked: list[str]
) -> None:
    virsh = tmp_path / "bin" / "virsh"
    virsh.parent.mkdir()
    virsh.write_text(f'#!/bin/sh\n[ "$1" = domstate ] && echo "{state}"\necho "$1" >> {tmp_path}/asked\n')
    virsh.chmod(0o755)
    drop.environ["PATH"] = f"{virsh.parent}:/usr/bin:/bin"
    example(drop, "10-freeze-filesystems")
    assert drop.run() == []
    words = (tmp_path / "asked").read_text().split()
    assert [word for word in words if word != "domstate"] == asked


def test_the_notifying_example_posts_what_was_done(drop: Folder) -> None:
    received: list[dict[str, object]] = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_args: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        drop.environ["NOTIFY_URL"] = f"http://127.0.0.1:{server.server_address[1]}/"
        example(drop, "90-notify")
        assert drop.run() == []
        server.shutdown()
    assert received == [{"text": "create of snapshot 's1' of domain d1: done", "plan": PLAN}]


@pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64")
def test_a_guest_that_cannot_be_frozen_gets_no_snapshot_and_runs_on(
    drop: Folder, daemon: Daemon, daemon_lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = daemon_lab.define(daemon_lab.disk())
    domain.create()
    drop.add("00-record")
    example(drop, "10-freeze-filesystems")
    monkeypatch.setenv(dropin.FOLDER_VARIABLE, str(drop.path))
    before = xml_of(domain), sorted(daemon_lab.folder.iterdir())
    with pytest.raises(PluginError, match=r"10-freeze-filesystems: before create: exit status 1: .*QEMU guest agent"):
        create_snapshot(daemon_lab.conn, domain.name(), "s1")
    assert domain.snapshotNum() == 0
    assert (xml_of(domain), sorted(daemon_lab.folder.iterdir())) == before
    assert domain.isActive()
    before_it, after_it = drop.told()
    assert before_it["plan"] == after_it["plan"]
    assert (before_it["phase"], after_it["phase"], after_it["result"]) == ("before", "after", "aborted")
    domain.destroy()
    assert create_snapshot(daemon_lab.conn, domain.name(), "s2").snapshot == "s2"  # shut off, nothing is to be frozen
    plan = drop.told()[-1]["plan"]
    assert isinstance(plan, dict)
    assert (plan["snapshot"], drop.told()[-1]["result"]) == ("s2", "done")
    assert daemon.virsh("snapshot-list", domain.name(), "--name").split() == ["s2"]
