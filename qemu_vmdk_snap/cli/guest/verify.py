"""`guest verify`: exit status 0 where a guest reads from a chain what it should, or boots to a pattern; 1 where not."""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.cli.guest.options import add_guest_options
from qemu_vmdk_snap.cli.image.common import add_allow_dir, add_progress, add_quiet
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import InvalidRequest
from qemu_vmdk_snap.light import TYPE_CHECKING
from qemu_vmdk_snap.units import format_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from qemu_vmdk_snap.domain.guest import DomainHardware
    from qemu_vmdk_snap.harness import Disk
    from qemu_vmdk_snap.harness.verify import Checked, VerifyReport


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
        "--against",
        type=Path,
        metavar="FILE",
        help="also compare with what was written: the checksums of an earlier --record, or a raw image",
    )
    parser.add_argument(
        "--expect",
        metavar="REGEX",
        help="boot the system on the disk itself until REGEX comes out of its first serial port; nothing is written",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="for --expect: how long, in seconds of the guest's own time (default 300)",
    )
    parser.add_argument(
        "-c", "--connect", dest="libvirt", metavar="URI", help="of a domain: the libvirt connection, as for virsh"
    )
    parser.add_argument("--snapshot", metavar="NAME", help="of a domain: its disks as they were at this snapshot")
    add_quiet(parser)
    add_progress(parser)
    add_allow_dir(parser)
    parser.add_argument("filename", type=Path, metavar="IMAGE|DOMAIN", help="an image, or the name of a domain")


def run(args: argparse.Namespace, ui: Ui) -> int:
    """Verify and say where it differs."""
    if args.timeout is not None and args.expect is None:
        raise InvalidRequest("--timeout", "is for --expect")
    if args.expect is not None and (args.record is not None or args.against is not None):
        raise InvalidRequest("--expect", "boots the system of the disk: it takes neither --record nor --against")
    if _is_domain(args):
        return _run_domain(args, ui)
    if args.expect is not None:
        return _expect(args, ui, args.filename, [], {})
    report = _verify(args.filename, args, ui, args.controller, args.allow_dir)
    if ui.json_output:
        ui.json(report.as_dict())
    else:
        _show(report, ui)
    return 0 if report.identical else 1


def _is_domain(args: argparse.Namespace) -> bool:
    """Return whether a domain is meant: one says so, or there is no file of that name, which looks like none either."""
    if args.libvirt is not None or args.snapshot is not None:
        return True
    name = str(args.filename)
    return "/" not in name and not name.endswith(".vmdk") and not Path(name).exists()


def _run_domain(args: argparse.Namespace, ui: Ui) -> int:
    from qemu_vmdk_snap.domain import connection, hardware_of

    if args.record is not None or args.against is not None:
        raise InvalidRequest("--record, --against", "are for one image, not for a domain")
    with connection(args.libvirt) as conn:
        hardware = hardware_of(conn, str(args.filename), args.snapshot)
    for line in hardware.left_out:
        ui.warn(f"domain {hardware.name}: {line}: left out")
    if args.expect is not None:
        return _expect_domain(args, ui, hardware)
    folders = [*args.allow_dir, *hardware.folders]
    reports = [
        (disk.target, _verify(disk.path, args, ui, args.controller or disk.controller, folders))
        for disk in hardware.disks
    ]
    good = all(report.identical for _, report in reports)
    if ui.json_output:
        disks = [{"target": target, **report.as_dict()} for target, report in reports]
        ui.json({"domain": hardware.name, "snapshot": hardware.snapshot, "identical": good, "disks": disks})
        return 0 if good else 1
    for target, report in reports:
        ui.text(f"Disk {target}:")
        _show(report, ui)
    return 0 if good else 1


def _verify(
    path: Path, args: argparse.Namespace, ui: Ui, controller: str | None, folders: Sequence[Path]
) -> VerifyReport:
    from qemu_vmdk_snap.harness.verify import verify_image
    from qemu_vmdk_snap.ops.progress import Progress

    def show(step: Checked) -> None:
        ui.progress(Progress("verify", step.done, step.total))

    return verify_image(
        path,
        controller=controller or "ahci",
        samples=args.samples,
        trusted_dirs=folders,
        record=args.record,
        against=args.against,
        log_dir=args.log,
        on_piece=show,
    )


def _expect_domain(args: argparse.Namespace, ui: Ui, hardware: DomainHardware) -> int:
    from qemu_vmdk_snap import read_links
    from qemu_vmdk_snap.harness import Disk

    for disk in hardware.disks:
        read_links(disk.path, trusted_dirs=[*args.allow_dir, *hardware.folders])
    first, *rest = hardware.disks
    args.controller = args.controller or first.controller
    about = {"domain": hardware.name, "snapshot": hardware.snapshot}
    options = {"machine": hardware.machine, "memory_mib": hardware.memory_mib, "uefi": hardware.uefi}
    return _expect(args, ui, first.path, [Disk(disk.path) for disk in rest], about, **options)


def _expect(
    args: argparse.Namespace, ui: Ui, image: Path, disks: list[Disk], about: dict[str, str | None], **options: object
) -> int:
    """Boot the system of the disk, and say what came out."""
    import re

    from qemu_vmdk_snap import read_links
    from qemu_vmdk_snap.harness import boot

    try:
        pattern = re.compile(args.expect.encode())
    except re.error as error:
        raise InvalidRequest("--expect", f"{args.expect!r} is not a regular expression: {error}") from None
    if not about:
        read_links(image, trusted_dirs=args.allow_dir)
    with boot(
        image.resolve(strict=True),
        controller=args.controller or "ahci",
        log_dir=args.log,
        seconds=args.timeout,
        expect=pattern,
        disks=disks,
        **options,  # type: ignore[arg-type] # as `_expect_domain` names them
    ) as guest:
        found = guest.found[0].decode(errors="replace") if guest.found is not None else ""
        seconds = guest.boot_seconds
    if ui.json_output:
        ui.json({**about, "path": str(image), "expected": args.expect, "found": found, "boot-seconds": seconds})
    else:
        ui.text(f"{image}: the system on it wrote {found!r} after {seconds:.1f} s")
    return 0


def _show(report: VerifyReport, ui: Ui) -> None:
    for mismatch in report.mismatches:
        ui.text(f"MISMATCH {mismatch}")
    ui.text(
        f"{report.path}: {report.depth} link{'s' if report.depth > 1 else ''}, {format_size(report.stored)} stored and "
        f"{format_size(report.sampled)} of holes read by the guest ({report.controller}) in {report.seconds:.1f} s: "
        + _verdict(report)
    )
    if report.holes_left_out:
        ui.text(f"{report.holes_left_out} more holes were not read")


def _verdict(report: VerifyReport) -> str:
    """Return no more than was proven: guest and engine may be wrong alike, if nothing else tells what was written."""
    if not report.identical:
        return f"{len(report.mismatches)} differ"
    agreed = "guest and engine agree"
    return agreed if report.against is None else f"as written in {report.against}, and {agreed}"
