"""One in-process libvirt and one private daemon for all tests of the folder: a first start of a guest is slow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap.domain.connect import open_connection
from tests.domain.lab import Lab
from tests.domain.libvirtd import Daemon, private_daemon

if TYPE_CHECKING:
    import libvirt


@pytest.fixture(scope="session")
def embed_uri(scratch_root: Path) -> str:
    return f"qemu:///embed?root={scratch_root / 'e'}"


@pytest.fixture(scope="session")
def embed(embed_uri: str) -> libvirt.virConnect:
    return open_connection(embed_uri)


@pytest.fixture
def lab(embed: libvirt.virConnect, embed_uri: str, scratch: Path) -> Iterator[Lab]:
    lab = Lab(embed, scratch, embed_uri)
    yield lab
    lab.close()


@pytest.fixture(scope="session")
def daemon(scratch_root: Path) -> Iterator[Daemon]:
    with private_daemon(scratch_root / "v") as daemon:
        yield daemon


@pytest.fixture
def daemon_lab(daemon: Daemon, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    # Records of a private system daemon do not belong among those of the machine.
    monkeypatch.setenv("QEMU_VMDK_SNAP_STATE", str(scratch / "state"))
    (scratch / "img").mkdir()
    lab = Lab(open_connection(daemon.uri), scratch / "img", daemon.uri)
    yield lab
    lab.close()
    lab.conn.close()
