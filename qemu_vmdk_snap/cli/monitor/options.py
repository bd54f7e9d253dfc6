"""What both commands for monitoring share."""

from __future__ import annotations

import argparse


def add_connection(parser: argparse.ArgumentParser, *short: str) -> None:
    """Add the connection; `short` is its short option, where that letter means nothing else."""
    parser.add_argument(
        *short,
        "--connect",
        metavar="URI",
        help="libvirt connection (default: LIBVIRT_DEFAULT_URI, or libvirt's own); qemu:///embed?root=/DIR: no daemon",
    )


def add_domains(parser: argparse.ArgumentParser) -> None:
    """Add the domains."""
    parser.add_argument(
        "domains", metavar="DOMAIN", nargs="*", help="name, id or UUID of a domain (default: all of the connection)"
    )
