"""A folder of disks with a connection, to the in-process libvirt or to the private daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap.domain.connect import open_connection
from tests.domain.lab import Lab
from tests.domain.libvirtd import Daemon

if TYPE_CHECKING:
    import libvirt


@pytest.fixture
def lab(embed: libvirt.virConnect, embed_uri: str, scratch: Path) -> Iterator[Lab]:
    lab = Lab(embed, scratch, embed_uri)
    yield lab
    lab.close()


@pytest.fixture
def daemon_lab(daemon: Daemon, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    # Records of a private system daemon do not belong among those of the machine.
    monkeypatch.setenv("QEMU_VMDK_SNAP_STATE", str(scratch / "state"))
    (scratch / "img").mkdir()
    lab = Lab(open_connection(daemon.uri), scratch / "img", daemon.uri)
    yield lab
    lab.close()
    lab.conn.close()
