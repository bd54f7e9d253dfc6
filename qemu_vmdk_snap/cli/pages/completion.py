"""`completion`: a script that lets a shell complete commands, options, domains, snapshots and files."""

from __future__ import annotations

import argparse

from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import PluginError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `completion`."""
    parser.add_argument(
        "shell", choices=("bash", "zsh", "fish"), help='e.g. in ~/.bashrc: eval "$(qemu-vmdk-snap completion bash)"'
    )


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Print the script."""
    from qemu_vmdk_snap.cli.commands import PROGRAM

    try:
        from argcomplete.shell_integration import shellcode
    except ImportError as error:
        raise PluginError("argcomplete", "is missing: install python3-argcomplete, or argcomplete (PyPI)") from error
    script = shellcode([PROGRAM], use_defaults=True, shell=args.shell)
    if ui.json_output:
        ui.json({"shell": args.shell, "script": script})
        return
    for line in script.splitlines():
        ui.text(line)
