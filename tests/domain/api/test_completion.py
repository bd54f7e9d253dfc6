"""Domains, snapshots and disks are offered at TAB, those of the connection that the line names."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qemu_vmdk_snap.domain.create.run import create_snapshot
from tests.domain.lab import Lab

pytestmark = pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64")


def offered(line: str) -> list[str]:
    """Return what the program offers for the last word of the line: it writes that to descriptor 8."""
    text = f"qemu-vmdk-snap {line}"
    shell = {"_ARGCOMPLETE": "1", "COMP_LINE": text, "COMP_POINT": str(len(text)), "_ARGCOMPLETE_IFS": "\n"}
    ask = f"'{sys.executable}' -m qemu_vmdk_snap 8>&1 9>/dev/null 1>/dev/null"
    done = subprocess.run(
        ["bash", "-c", ask], env=os.environ | shell, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == ""
    return sorted(word.strip() for word in done.stdout.split("\n") if word.strip())


def test_names_come_from_libvirt(daemon_lab: Lab) -> None:
    lab = daemon_lab
    one, other = lab.define(lab.disk("a"), lab.disk("b")), lab.define(lab.disk("c"))
    for name in ("before", "between"):
        create_snapshot(lab.conn, one.name(), name)
    at = f"-c {lab.uri}"
    assert {one.name(), other.name()} <= {*offered(f"snapshot delete {at} d")}
    for line in (
        f"snapshot delete {at} {one.name()} --children be",
        f"snapshot clone --full {at} {one.name()} be",
        f"snapshot list {at} {one.name()} --from be",
    ):
        assert offered(line) == ["before", "between"], line
    assert offered(f"snapshot create {at} {one.name()} --diskspec v") == ["vda", "vdb"]
    assert offered(f"snapshot delete {at} {other.name()} be") == []
    assert offered(f"snapshot delete -c qemu+ssh://nowhere/system {one.name()} be") == []
