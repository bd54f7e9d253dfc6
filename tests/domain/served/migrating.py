"""Two daemons on this machine, each another host to libvirt, with the hook in both."""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.domain.hooks import install as hooks
from tests.domain.libvirtd import Daemon


def host(folder: Path, number: int, state: Path) -> Daemon:
    """Return a running daemon with the hook, which says that it is host `number`."""
    daemon = Daemon(folder)
    conf = daemon.conf / "libvirtd.conf"
    conf.write_text(f'{conf.read_text()}host_uuid = "00000000-1111-2222-3333-44444444444{number}"\n')
    hooks.install(folder / "etc" / "hooks" / "qemu.d", folder / "policies", {"QEMU_VMDK_SNAP_STATE": str(state)})
    (folder / "policies" / "moving.toml").write_text(f'connect = "{daemon.uri}"')
    daemon.start()
    return daemon
