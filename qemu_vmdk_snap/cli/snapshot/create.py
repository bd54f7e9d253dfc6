"""`snapshot create`: freeze the VMDK disks of a domain, and let it go on in new overlays."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qemu_vmdk_snap.cli.snapshot.options import add_domain, add_dry_run
from qemu_vmdk_snap.cli.snapshot.report import disk_lines, show
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import InvalidRequest

if TYPE_CHECKING:
    from qemu_vmdk_snap.domain.create.run import SnapshotReport
    from qemu_vmdk_snap.domain.qemu.switch import Pause


class DiskSpec(NamedTuple):
    """One `--diskspec`."""

    disk: str
    takes_part: bool
    overlay: Path | None


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_domain(parser)
    parser.add_argument(
        "snapshotname", metavar="NAME", nargs="?", help="name of the snapshot (default: seconds since 1970)"
    )
    parser.add_argument("--name", help="the same, as virsh snapshot-create-as has it")
    parser.add_argument("--description", metavar="TEXT", help="description of the snapshot")
    parser.add_argument("--disk-only", action="store_true", help="only the disks, no memory (the default)")
    parser.add_argument(
        "--memspec",
        metavar="[file=]FILE[,snapshot=external]",
        help="save the guest's memory too, in FILE; all its disks must be served (see `serve attach`)",
    )
    parser.add_argument(
        "--quiesce",
        choices=("auto", "require", "no"),
        nargs="?",
        const="require",
        default="no",
        help="freeze the file systems of a running guest with its agent: no (default), auto (if possible), or require",
    )
    parser.add_argument(
        "--diskspec",
        metavar="DISK[,snapshot=no|external][,file=PATH]",
        action="append",
        default=[],
        help="what to do with one disk, named by target or file; double a comma in PATH (may be repeated)",
    )
    add_dry_run(parser)


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Take the snapshot and say what was done."""
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.create.run import create_snapshot
    from qemu_vmdk_snap.domain.dry_run import plan_create

    if args.name is not None and args.snapshotname not in (None, args.name):
        raise InvalidRequest(f"snapshot names {args.snapshotname!r} and {args.name!r}", "give one")
    if args.memspec is not None and args.disk_only:
        raise InvalidRequest("--disk-only", "leaves no use for --memspec")
    specs = [parse_diskspec(text) for text in args.diskspec]
    with connection(args.connect) as conn:
        take = plan_create if args.dry_run else create_snapshot
        report = take(
            conn,
            args.domain,
            args.snapshotname if args.name is None else args.name,
            args.description,
            required=[spec.disk for spec in specs if spec.takes_part],
            exclude=[spec.disk for spec in specs if not spec.takes_part],
            overlays={spec.disk: spec.overlay for spec in specs if spec.overlay is not None},
            quiesce=args.quiesce,
            memory=None if args.memspec is None else parse_memspec(args.memspec),
        )
    show(ui, report, report.as_dict(), _lines(report))


def _lines(report: SnapshotReport) -> list[str]:
    lines = [
        f"Domain snapshot {report.snapshot} {'would be created' if report.dry_run else 'created'}",
        *disk_lines(report.disks),
    ]
    if report.memory is not None:
        lines.append(f"  memory: {report.memory}")
    if report.pause is not None:
        lines.append(f"  {_pause_line(report.pause)}")
    return lines + [f"  {target}: not part of it: {reason}" for target, reason in report.skipped]


def _pause_line(pause: Pause) -> str:
    parts = [f"disk requests waited {pause.stalled:.1f} ms"]
    if pause.stopped is not None:
        parts.append(f"its CPUs were stopped for {pause.stopped:.1f} ms")
    if pause.frozen is not None:
        parts.append(f"its file systems were frozen for {pause.frozen:.1f} ms")
    return "the guest ran on: " + ", ".join(parts)


def parse_memspec(text: str) -> Path:
    """Return the file that a `--memspec` names, in virsh's syntax.

    Raises:
        InvalidRequest: it says something else than that, or that the memory is external.
    """
    file: Path | None = None
    for number, setting in enumerate(part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")):
        key, equals, value = setting.partition("=")
        if key == "file" and value:
            file = Path(value)
        elif number == 0 and setting and not equals:
            file = Path(setting)
        elif (key, value) != ("snapshot", "external"):
            raise InvalidRequest(f"memspec {text!r}", f"{setting!r} is not possible")
    if file is None:
        raise InvalidRequest(f"memspec {text!r}", "must name a file")
    return file.absolute()


def parse_diskspec(text: str) -> DiskSpec:
    """Return what a `--diskspec` says, in virsh's syntax.

    Raises:
        InvalidRequest: it says something that is not known, or that VMDK disks cannot do.
    """
    disk, *settings = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
    takes_part = True
    overlay: Path | None = None
    for setting in settings:
        key, _, value = setting.partition("=")
        if key == "snapshot" and value in ("no", "external"):
            takes_part = value == "external"
        elif key == "file" and value:
            overlay = Path(value)
        elif (key, value) not in (("driver", "vmdk"), ("stype", "file")):
            raise InvalidRequest(f"diskspec {text!r}", f"{setting!r} is not possible for a VMDK disk")
    if not disk:
        raise InvalidRequest(f"diskspec {text!r}", "must begin with a disk")
    if not takes_part and overlay is not None:
        raise InvalidRequest(f"diskspec {text!r}", "snapshot=no leaves no use for file=")
    return DiskSpec(disk, takes_part, overlay)
