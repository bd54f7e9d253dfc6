"""`recover`: finish or undo interrupted operations."""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.cli.image.common import add_allow_dir, add_quiet
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.domain.journal.pending import Unfinished


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `recover`."""
    add_quiet(parser)
    parser.add_argument(
        "-c",
        "--connect",
        metavar="URI",
        help="finish or undo the operations on snapshots of the domains of this libvirt connection",
    )
    parser.add_argument("--domains", action="store_true", help="the same, on the default connection of libvirt")
    parser.add_argument(
        "--domain",
        metavar="NAME",
        action="append",
        default=[],
        help="only this domain: name, id or UUID (may be repeated)",
    )
    parser.add_argument(
        "--abandon",
        action="store_true",
        help="delete the record of an unfinished operation instead of finishing it; images and domains are not changed",
    )
    add_allow_dir(parser)
    parser.add_argument(
        "path",
        nargs="*",
        help="an image, or a folder of images (default: this folder); with -c or --domains: a domain (default: all)",
    )


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Finish every interrupted operation and name it."""
    if args.domains or args.domain or args.connect is not None:
        _run_domains(args, ui)
    else:
        _run_images(args, ui)


def _run_domains(args: argparse.Namespace, ui: Ui) -> None:
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.journal.pending import abandon
    from qemu_vmdk_snap.domain.journal.recover import recover

    names = [*args.domain, *args.path]
    if args.abandon:
        with connection(args.connect) as conn:
            gone = abandon(conn, names)
        _show_abandoned(gone, ui)
        return
    with connection(args.connect) as conn:
        settled = recover(conn, names)
    if ui.json_output:
        ui.json([one.as_dict() for one in settled])
        return
    for one in settled:
        what = "finished" if one.finished else "undid"
        ui.text(f"domain {one.domain}: {what} the interrupted {one.operation}{_of(one.snapshot)}")
        for path in one.left:
            ui.text(f"  left in place: {path}")
    if not settled:
        ui.text("Nothing to recover.")


def _of(snapshot: str | None) -> str:
    return f" of snapshot {snapshot}" if snapshot else ""


def _show_abandoned(gone: list[Unfinished], ui: Ui) -> None:
    if ui.json_output:
        ui.json([one.as_dict() for one in gone])
        return
    for one in gone:
        about = f"the record {one.record}" if one.intent is None else f"the {one.operation}{_of(one.snapshot)}"
        ui.text(f"domain {one.domain}: abandoned {about}" + (f" ({one.problem})" if one.problem else ""))
        for path in one.files:
            ui.text(f"  left as it is: {path}")
    if not gone:
        ui.text("Nothing to abandon.")


def _run_images(args: argparse.Namespace, ui: Ui) -> None:
    from qemu_vmdk_snap.ops.journal.recover import SWEEP, give_up, recover

    paths = [Path(path) for path in args.path] or [Path()]
    if args.abandon:
        found = [one for path in paths for one in give_up(path)]
    else:
        found = [one for path in paths for one in recover(path, trusted_dirs=args.allow_dir)]
    if ui.json_output:
        ui.json([one.as_dict() for one in found])
        return
    for one in found:
        if args.abandon:
            ui.text(f"{one.image}: abandoned the interrupted {one.operation}")
            for path in one.images:
                ui.text(f"  left as it is: {path}")
        elif one.operation == SWEEP:
            ui.text(f"{one.image}: removed (left by a killed command)")
        else:
            ui.text(f"{one.image}: finished the interrupted {one.operation}")
    if not found:
        ui.text("Nothing to recover.")
