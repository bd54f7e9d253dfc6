"""`metrics` and `monitor` beside real domains, on the in-process libvirt."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qemu_vmdk_snap import read_links
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain import create_snapshot
from tests.domain.lab import Lab
from tests.support.schemas import check


def values(text: str, domain: str) -> dict[str, str]:
    """Return the samples of one domain: metric and further labels, as one text, to value."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if f'domain="{domain}"' in name:
            found[name.removeprefix("qemu_vmdk_snap_domain_").replace(f'domain="{domain}"', "")] = value
    return found


def test_metrics_of_several_domains(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    good, broken = lab.define(lab.disk("a"), lab.disk("b")), lab.define(lab.disk("c"))
    before = int(time.time())
    create_snapshot(lab.conn, good.name(), "s1")
    create_snapshot(lab.conn, good.name(), "s2")
    create_snapshot(lab.conn, broken.name(), "s1")
    (lab.folder / "c.vmdk").unlink()
    links = read_links(next(lab.folder.glob("a-000002.vmdk")))[1:]
    frozen = [sum(link.path.stat().st_blocks * 512 for link in links)]
    assert main(["metrics", "-c", lab.uri, good.name(), broken.name()]) == 1
    frozen.append(sum(link.path.stat().st_blocks * 512 for link in links))  # the file system may have settled them
    text, said = capsys.readouterr()
    assert f"domain {broken.name()}: disk vda: " in said
    own = values(text, good.name())
    assert own["readable{}"] == "1"
    assert own["snapshots{}"] == "2"
    assert before <= int(own["oldest_snapshot_timestamp_seconds{}"]) <= int(own["newest_snapshot_timestamp_seconds{}"])
    assert own['disk_chain_depth{,target_device="vdb"}'] == "3"
    assert int(own['disk_frozen_bytes{,target_device="vda"}']) in frozen
    assert own['doctor_findings{,verdict="bad"}'] == "0"
    other = values(text, broken.name())  # what could be read is there
    assert (other["readable{}"], other["snapshots{}"]) == ("0", "1")
    assert int(other['doctor_findings{,verdict="bad"}']) > 0
    assert "qemu_vmdk_snap_last_run_success 0\n" in text


def test_the_textfile_is_replaced_in_one_step_and_readable(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    domain = lab.define(lab.disk("a"))
    file = lab.folder / "vmdk.prom"
    file.write_text("yesterday\n")
    old = file.stat().st_ino
    mask = os.umask(0o077)
    try:
        assert main(["metrics", "-c", lab.uri, "--textfile", str(file), "--output=json", domain.name()]) == 0
    finally:
        os.umask(mask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert file.stat().st_ino != old
    assert f'qemu_vmdk_snap_domain_snapshots{{domain="{domain.name()}"}} 0\n' in file.read_text()
    assert [path.name for path in lab.folder.iterdir() if path.name.startswith(".")] == []
    answer = check("metrics", capsys.readouterr().out)
    assert {"metric": "domain_snapshots", "domain": domain.name(), "value": 0} in answer["samples"]


def test_no_libvirt_is_reported_in_the_textfile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise the figures of yesterday would be read for ever."""
    file = tmp_path / "vmdk.prom"
    assert main(["metrics", "-c", f"qemu+unix:///session?socket={tmp_path}/none", "--textfile", str(file)]) == 70
    text = file.read_text()
    assert "qemu_vmdk_snap_last_run_success 0\n" in text
    assert "qemu_vmdk_snap_domain" not in text
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        (["count", "-w", "5"], 0, "VMDK_SNAP OK - count of 1 domain within its thresholds |'{d}'=2;5;;0"),
        (["count", "-w", "1", "-c", "5"], 1, "VMDK_SNAP WARNING - {d}: 2 snapshots |'{d}'=2;1;5;0"),
        (["count", "-w", "1", "-c", "1"], 2, "VMDK_SNAP CRITICAL - {d}: 2 snapshots |'{d}'=2;1;1;0"),
        (["depth", "-c", "@3"], 2, "VMDK_SNAP CRITICAL - {d} vda: chain of 3 |'{d} vda'=3;;@0:3;0"),
        (["overlay-size", "-w", "1K:"], 0, "VMDK_SNAP OK - overlay-size of 1 domain within its thresholds |'{d} vda'="),
        (["age", "-w", "7d"], 0, "VMDK_SNAP OK - age of 1 domain within its thresholds |'{d}'="),
        (["age", "--newest", "-c", "1h:"], 2, "VMDK_SNAP CRITICAL - {d}: newest snapshot is "),
        (["doctor"], 0, "VMDK_SNAP OK - doctor of 1 domain within its thresholds |'{d}'=0;;0;0"),
        (["count", "-w", "many"], 3, "VMDK_SNAP UNKNOWN - threshold: 'many': must be a range"),
        (["--bogus"], 3, "VMDK_SNAP UNKNOWN - qemu-vmdk-snap monitor: "),
    ],
)
def test_each_mode_has_one_line(
    lab: Lab, capsys: pytest.CaptureFixture[str], words: list[str], status: int, line: str
) -> None:
    name = lab.define(lab.disk("a")).name()
    create_snapshot(lab.conn, name, "s1")
    create_snapshot(lab.conn, name, "s2")
    assert main(["monitor", words[0], name, *words[1:], "--connect", lab.uri]) == status
    out, said = capsys.readouterr()
    assert out.startswith(line.format(d=name))
    assert (out.count("\n"), out.count("|") <= 1, said) == (1, True, "")


def test_a_broken_domain_does_not_hide_the_others(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    good, broken = lab.define(lab.disk("a")), lab.define(lab.disk("b"))
    create_snapshot(lab.conn, broken.name(), "s1")
    (lab.folder / "b.vmdk").unlink()
    names = [good.name(), broken.name(), "nobody"]
    assert main(["monitor", "depth", *names, "--connect", lab.uri, "--output=json"]) == 3
    answer = check("monitor", capsys.readouterr().out)
    assert [(one["state"], one["text"].split(":")[0]) for one in answer["results"]] == [
        ("OK", f"{good.name()} vda"),
        ("UNKNOWN", broken.name()),
        ("UNKNOWN", "nobody"),
    ]
    assert main(["monitor", "doctor", *names[:2], "-v", "--connect", lab.uri]) == 2
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith(f"VMDK_SNAP CRITICAL - {broken.name()}: ")
    assert any(line.startswith(f"{broken.name()}: disk vda: ") for line in rest)


def test_a_domain_without_a_snapshot_is_too_old(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    name = lab.define(lab.disk("a")).name()
    assert main(["monitor", "age", name, "--newest", "-w", "1d", "--connect", lab.uri]) == 1
    assert capsys.readouterr().out == f"VMDK_SNAP WARNING - {name}: has no snapshot\n"
    assert main(["monitor", "age", name, "-w", "1d", "--connect", lab.uri]) == 0


def test_a_libvirt_that_never_answers_is_unknown_in_time(tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "s"))
        silent.listen()
        uri = f"qemu+unix:///session?socket={tmp_path}/s"
        command = [sys.executable, "-m", "qemu_vmdk_snap", "monitor", "count", "-t", "1", "--connect", uri]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (3, "VMDK_SNAP UNKNOWN - no answer within 1 s\n")
