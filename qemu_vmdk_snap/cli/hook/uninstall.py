"""`hook uninstall`: remove the hook."""

from __future__ import annotations

from qemu_vmdk_snap.cli.hook.options import add_folder
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_folder(parser)


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Remove it; policies stay."""
    from qemu_vmdk_snap.domain.hooks import install as hooks

    folder = args.dir.absolute()
    removed = hooks.uninstall(folder)
    if ui.json_output:
        ui.json({"removed": str(folder / hooks.NAME) if removed else None})
    else:
        ui.text(f"Hook {folder / hooks.NAME} removed" if removed else f"No hook in {folder}")
