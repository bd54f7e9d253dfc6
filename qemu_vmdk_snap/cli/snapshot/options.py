"""What the snapshot commands share: the connection, and how an unfinished operation is reported."""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.cli.image.common import add_allow_dir
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.domain.journal.recover import Recovery


def add_domain(parser: argparse.ArgumentParser, *, or_all: bool = False) -> None:
    """Add the connection and the domain, as virsh has them; `or_all`: `--all` is possible instead of a domain."""
    parser.add_argument(
        "-c",
        "--connect",
        metavar="URI",
        help="libvirt connection (default: LIBVIRT_DEFAULT_URI, or libvirt's own); qemu:///embed?root=/DIR: no daemon",
    )
    if or_all:
        add_all(parser)
    nargs = "?" if or_all else None
    add_allow_dir(parser)
    parser.add_argument("domain", metavar="DOMAIN", nargs=nargs, help="name, id or UUID of the domain")


def add_all(parser: argparse.ArgumentParser) -> None:
    """Add `--all`."""
    parser.add_argument(
        "--all", action="store_true", help="every domain of the connection; one that fails does not stop the others"
    )


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Add `--dry-run`."""
    parser.add_argument("-n", "--dry-run", action="store_true", help="print what would be done, and change nothing")


def add_orphans(parser: argparse.ArgumentParser) -> None:
    """Add `--orphan`."""
    parser.add_argument(
        "--orphan",
        type=Path,
        metavar="FILE",
        action="append",
        default=[],
        help="continue although FILE, or the disk that has it as its top, needs what changes (may be repeated)",
    )


def tell_recovery(recovery: Recovery | None, ui: Ui) -> None:
    """Report on standard error that an unfinished operation was finished or undone first."""
    if recovery is None:
        return
    what = "was finished" if recovery.finished else "was undone"
    left = f"; left in place: {', '.join(map(str, recovery.left))}" if recovery.left else ""
    which = "snapshot" if recovery.operation == "create" else recovery.operation
    if recovery.snapshot:
        which += f" {recovery.snapshot!r}" if which == "snapshot" else f" of snapshot {recovery.snapshot!r}"
    ui.warn(f"domain {recovery.domain}: the interrupted {which} {what}{left}")


def warn_pending(line: str | None, ui: Ui) -> None:
    """Report an unfinished operation on standard error, for a command that only reads."""
    if line is not None:
        ui.warn(line)
