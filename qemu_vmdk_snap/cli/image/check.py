"""`image check`: exit status 0 where nothing is wrong, 2 for corruptions, 3 for leaked grains alone.

1: something could not be checked, and no corruption was found.
"""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.cli.image.common import add_cache, add_open_options, add_progress, need_vmdk
from qemu_vmdk_snap.cli.image.names import image_file
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.chain.resolver import Resolver
    from qemu_vmdk_snap.ops.check.check import CheckReport


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `image check`."""
    add_open_options(parser)
    parser.add_argument(
        "--backing-chain", action="store_true", help="check the tables of every image of the chain, not only of the top"
    )
    parser.add_argument(
        "-r",
        "--repair",
        choices=("leaks", "all"),
        help="free leaked grains, or repair everything that can be repaired; an undo file is written first",
    )
    parser.add_argument("--undo-file", type=Path, metavar="FILE", help="the undo file of -r (default: FILENAME.undo)")
    parser.add_argument(
        "--relink-cids",
        action="store_true",
        help="with -r all: accept each parent as it is and write its CID into its overlay",
    )
    parser.add_argument("--take-back", type=Path, metavar="FILE", help="undo a repair with its undo file, then check")
    add_cache(parser, "-T", "--src-cache", "accepted, without effect")
    add_progress(parser)
    parser.add_argument("filename", type=image_file, help="the image")
    parser.set_defaults(error_status=1)


def run(args: argparse.Namespace, ui: Ui) -> int:
    """Check and show what was found; notes do not change the exit status."""
    from qemu_vmdk_snap.chain.resolver import confined
    from qemu_vmdk_snap.ops.check.check import check_image

    if args.format != "vmdk":
        args.error_status = None  # qemu-img's for a format that has no checks: 63, that of what is not supported
    need_vmdk(args.filename, args.format)
    resolver = confined(args.allow_dir)
    if args.take_back is not None:
        from qemu_vmdk_snap.ops.check.repair import take_back

        take_back(args.take_back, trusted_dirs=[*args.allow_dir, args.filename.resolve().parent])
    if args.relink_cids and args.repair != "all":
        ui.warn("--relink-cids is ignored: it changes images, and needs -r all")
    fixed = _repair(args, resolver, ui) if args.repair else None
    report = check_image(
        args.filename,
        resolver=resolver,
        whole_chain=args.backing_chain,
        lock=not args.force_share,
        on_progress=ui.progress,
    )
    if ui.json_output:
        ui.json(report.as_dict() | (fixed or {}))
    else:
        _show(report, ui)
    if report.corruptions:
        return 2
    if report.check_errors:
        return 1
    return 3 if report.leaks else 0


def _repair(args: argparse.Namespace, resolver: Resolver, ui: Ui) -> dict[str, object]:
    """Repair, show what was repaired in qemu-img's words, and return its JSON keys."""
    from qemu_vmdk_snap.ops.check.repair import repair

    report = repair(
        args.filename,
        resolver=resolver,
        leaks_only=args.repair == "leaks",
        relink_cids=args.relink_cids and args.repair == "all",
        undo=args.undo_file,
        on_progress=ui.progress,
    )
    if args.relink_cids and args.repair == "all" and not report.relinked:
        ui.warn("--relink-cids is ignored: the parentCID of every link is the CID of its parent")
    if report.undo is not None and not ui.json_output:
        ui.text("The following inconsistencies were found and repaired:\n")
        ui.text(f"    {report.leaks_fixed} leaked clusters")
        ui.text(f"    {report.corruptions_fixed} corruptions")
        if settled := max(0, report.before.repairable - report.after.repairable):
            ui.text(f"    {settled} values that an interrupted writer left, or that QEMU does not keep")
        ui.text()
        for link in report.relinked:
            ui.text(f"{link}: parentCID is now the CID of its parent.")
        ui.text(f"What was there before is in {report.undo} (--take-back).")
        ui.text("Double checking the fixed image now...")
    return report.as_dict()


def _show(report: CheckReport, ui: Ui) -> None:
    words = {"corruption": "ERROR", "error": "Not checked", "leak": "Leaked", "note": "Note"}
    for finding in report.findings:
        ui.text(f"{words[finding.severity]} {finding}")
    if report.corruptions:
        ui.text(f"\n{report.corruptions} errors were found on the image.")
        ui.text("Data may be corrupted, or further writes to the image may corrupt it.")
    if report.leaks:
        ui.text(f"\n{report.leaks} leaked clusters were found on the image.")
        ui.text("This means waste of disk space, but no harm to data.")
    if report.check_errors:
        ui.text(f"\n{report.check_errors} internal errors have occurred during the check.")
    if not report.corruptions and not report.leaks and not report.check_errors:
        ui.text("No errors were found on the image.")
    if report.total and report.allocated:
        share = 100.0 * report.allocated / report.total
        fragmented = 100.0 * report.fragmented / report.allocated
        compressed = 100.0 * report.compressed / report.allocated
        ui.text(
            f"{report.allocated}/{report.total} = {share:.2f}% allocated, {fragmented:.2f}% fragmented, "
            f"{compressed:.2f}% compressed clusters"
        )
    ui.text(f"Image end offset: {report.end}")
