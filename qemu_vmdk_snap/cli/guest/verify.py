"""`guest verify`: exit status 0 where a guest reads from a chain what the engine reads, 1 where not."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_vmdk_snap.cli.guest.options import add_guest_options
from qemu_vmdk_snap.cli.image.common import add_allow_dir, add_progress, add_quiet
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.units import format_size

if TYPE_CHECKING:
    from qemu_vmdk_snap.harness.verify import Checked


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `guest verify`."""
    add_guest_options(parser)
    parser.add_argument(
        "--samples", type=int, default=8, metavar="N", help="number of places to read in each hole (default 8)"
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="write the checksums of what the guest read to FILE"
    )
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="also compare with the checksums of an earlier --record"
    )
    add_quiet(parser)
    add_progress(parser)
    add_allow_dir(parser)
    parser.add_argument("filename", type=Path, metavar="IMAGE", help="the image")


def run(args: argparse.Namespace, ui: Ui) -> int:
    """Verify and say where it differs."""
    from qemu_vmdk_snap.harness.verify import verify_image
    from qemu_vmdk_snap.ops.progress import Progress

    def show(step: Checked) -> None:
        ui.progress(Progress("verify", step.done, step.total))

    report = verify_image(
        args.filename,
        controller=args.controller,
        samples=args.samples,
        trusted_dirs=args.allow_dir,
        record=args.record,
        against=args.against,
        log_dir=args.log,
        on_piece=show,
    )
    if ui.json_output:
        ui.json(report.as_dict())
        return 0 if report.identical else 1
    for mismatch in report.mismatches:
        ui.text(f"MISMATCH {mismatch}")
    ui.text(
        f"{report.path}: {report.depth} link{'s' if report.depth > 1 else ''}, {format_size(report.stored)} stored and "
        f"{format_size(report.sampled)} of holes read by the guest ({report.controller}) in {report.seconds:.1f} s: "
        + ("as the engine reads them" if report.identical else f"{len(report.mismatches)} differ")
    )
    if report.holes_left_out:
        ui.text(f"{report.holes_left_out} more holes were not read")
    return 0 if report.identical else 1
