"""What the hook commands share: where libvirt looks for hooks, and where the policies are."""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.domain.hooks.install import FOLDER
from qemu_vmdk_snap.domain.hooks.policy import FOLDER as POLICIES
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Add `--dir`."""
    parser.add_argument(
        "--dir", type=Path, default=FOLDER, metavar="DIR", help=f"libvirt's folder of hooks (default: {FOLDER})"
    )


def add_policies(parser: argparse.ArgumentParser, default: Path | None = POLICIES) -> None:
    """Add `--policies`."""
    shown = POLICIES if default is not None else "what the hook says"
    parser.add_argument(
        "--policies", type=Path, default=default, metavar="DIR", help=f"folder of the policies (default: {shown})"
    )
