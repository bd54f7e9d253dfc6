"""`guest boot`: boot the probe on an image and let it answer commands."""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.cli.guest.options import add_guest_options
from qemu_vmdk_snap.cli.image.common import add_orphan
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `guest boot`."""
    parser.add_argument(
        "-f", "--format", default="vmdk", choices=("vmdk", "raw"), help="format of the image (default vmdk)"
    )
    parser.add_argument("--write", action="store_true", help="let the guest write to the image")
    add_orphan(parser)
    parser.add_argument(
        "--from-disk", action="store_true", help="boot from the image itself, whose first sectors contain the probe"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=15.0,
        metavar="SECONDS",
        help="how long to wait for the probe to boot, on an idle machine (default 15)",
    )
    add_guest_options(parser)
    parser.add_argument("filename", type=Path, metavar="IMAGE", help="the image")
    parser.add_argument(
        "commands",
        nargs="*",
        metavar="COMMAND",
        help="'size', 'crc LBA COUNT', 'dump LBA', 'pattern SEED LBA COUNT': one argument each, numbers in hexadecimal",
    )


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Boot, ask, show each answer, switch off."""
    from qemu_vmdk_snap import require_writable
    from qemu_vmdk_snap.harness import boot

    answers = []
    image = args.filename.resolve(strict=True)
    if args.write and args.format == "vmdk":
        require_writable(image, orphans=args.orphan)
    with boot(
        image,
        image_format=args.format,
        controller=args.controller or "ahci",
        from_disk=args.from_disk,
        writable=args.write,
        log_dir=args.log,
        seconds=args.timeout,
    ) as machine:
        if not ui.json_output:
            ui.text(f"probe booted in {machine.boot_seconds:.2f} s, disk of {machine.probe.size()} bytes")
        for command in args.commands:
            answer = machine.probe.command(command, moving=1 << 30)
            answers.append({"command": command, "answer": answer})
            if not ui.json_output:
                ui.text(f"{command}: {answer or 'ok'}")
        seconds, size = machine.boot_seconds, machine.probe.size()
        machine.power_off()
    if ui.json_output:
        ui.json({"boot-seconds": seconds, "virtual-size": size, "answers": answers})
