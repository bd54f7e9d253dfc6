"""`hook install`: put the hook where libvirt runs it."""

from __future__ import annotations

from qemu_vmdk_snap.cli.hook.options import add_folder, add_policies
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_folder(parser)
    add_policies(parser)


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Install it, and show what remains to be done."""
    from qemu_vmdk_snap.domain.hooks import install as hooks

    path = hooks.install(args.dir.absolute(), args.policies.absolute())
    if ui.json_output:
        ui.json({"installed": str(path), "policies": str(args.policies.absolute())})
        return
    ui.text(f"Hook {path} installed")
    ui.text(f"Policies: {args.policies.absolute()}/UUID.toml or NAME.toml (a domain without one starts as usual)")
    ui.text(
        "libvirt notices the first hook in its folder when it is restarted: systemctl restart libvirtd (or virtqemud)"
    )
