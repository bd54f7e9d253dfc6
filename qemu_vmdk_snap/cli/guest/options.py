"""What the guest commands share."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_guest_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the machine: `--controller`, `--log`."""
    parser.add_argument(
        "--controller",
        metavar="NAME",
        help="controller of the disk: ide, ahci (default, or the domain's), virtio-blk, virtio-scsi, pvscsi, lsi, nvme",
    )
    parser.add_argument(
        "--log",
        type=Path,
        metavar="DIR",
        help="keep the command line and standard error of QEMU, and the serial log, in DIR",
    )
