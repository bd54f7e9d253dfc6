"""`snapshot create`: freeze the VMDK disks of a domain, which continues in new overlays."""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.cli.snapshot.options import add_domain, add_dry_run
from qemu_vmdk_snap.cli.snapshot.report import disk_lines, pause_line, show
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import InvalidRequest
from qemu_vmdk_snap.light import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.domain.create.run import SnapshotReport


OPTIONAL_VALUES = {"--quiesce": ("require", "auto", "no")}
"""Options whose value may be left out: then it is the first one."""


_REFUSED = {
    "no_metadata": "what libvirt does not know can be neither reverted nor deleted: `image create -b` makes an overlay",
    "halt": "shut the guest down (virsh shutdown) and create the snapshot then: its disks are consistent then",
    "reuse_external": "an overlay is always made, and no file is overwritten: remove the one that is there",
}
"""Options of virsh that are not possible here, and the way that is."""


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
    parser.add_argument("--atomic", action="store_true", help="all disks or none (always the case)")
    parser.add_argument("--live", action="store_true", help="while the guest runs (always the case if it does)")
    parser.add_argument("--validate", action="store_true", help="only valid XML for libvirt (always the case)")
    parser.add_argument("--print-xml", action="store_true", help="print the XML of the snapshot, and make none")
    for option in _REFUSED:
        parser.add_argument(f"--{option.replace('_', '-')}", action="store_true", help="not possible: says what is")
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
    parser.add_argument(
        "--naming",
        choices=("number", "uuid"),
        default="number",
        help="names of the overlays: DISK-000001.vmdk and so on (number, the default), or UUID.vmdk (uuid)",
    )
    add_dry_run(parser)


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Take the snapshot and say what was done."""
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.create.run import create_snapshot
    from qemu_vmdk_snap.domain.dry_run import plan_create
    from qemu_vmdk_snap.domain.state import is_running

    if args.name is not None and args.snapshotname not in (None, args.name):
        raise InvalidRequest(f"the snapshot has two names: {args.snapshotname!r} and {args.name!r}", "give one")
    if args.memspec is not None and args.disk_only:
        raise InvalidRequest("--disk-only", "leaves no use for --memspec")
    for option, way in _REFUSED.items():
        if getattr(args, option):
            raise InvalidRequest(f"--{option.replace('_', '-')}", way)
    specs = [parse_diskspec(text) for text in args.diskspec]
    with connection(args.connect) as conn:
        take = plan_create if args.dry_run or args.print_xml else create_snapshot
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
            naming=args.naming,
        )
        if args.print_xml:
            text = _xml(report, args.description, running=is_running(conn, args.domain))
            show(ui, report, report.as_dict() | {"xml": text}, text.splitlines())
            return
    show(ui, report, report.as_dict(), _lines(report))


def _xml(report: SnapshotReport, description: str | None, *, running: bool) -> str:
    """Return the XML by which the snapshot would be registered, without the domain inside."""
    from qemu_vmdk_snap.domain.xml import SnapshotDisk, SnapshotXml, snapshot_xml

    disks = [SnapshotDisk(disk.target, "external", disk.overlay, disk.frozen) for disk in report.disks]
    disks += [SnapshotDisk(target, "no", None, None) for target, _ in report.skipped]
    state = "disk-snapshot" if running else "shutoff"
    header = SnapshotXml(report.snapshot, state, report.creation_time, description, report.parent, disks=tuple(disks))
    return snapshot_xml(header, "").replace("\n\n", "\n")


def _lines(report: SnapshotReport) -> list[str]:
    lines = [
        f"Domain snapshot {report.snapshot} {'would be created' if report.dry_run else 'created'}",
        *disk_lines(report.disks),
    ]
    if report.nvram is not None:
        lines.append(f"  nvram: {report.nvram}")
    if report.memory is not None:
        lines.append(f"  memory: {report.memory}")
    if report.pause is not None:
        lines.append(f"  {pause_line(report.pause)}")
    if report.live_xml_stale:
        what = "until the guest stops, libvirt's live XML names the files of before"
        lines.append(f"  {what}: define nothing but `virsh dumpxml --inactive`")
    return lines + [f"  {target}: not in the snapshot: {reason}" for target, reason in report.skipped]


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
    """Return a parsed `--diskspec`, in virsh's syntax.

    Raises:
        InvalidRequest: it is invalid, or not possible for VMDK disks.
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
        raise InvalidRequest(f"diskspec {text!r}", "file= cannot go with snapshot=no")
    return DiskSpec(disk, takes_part, overlay)
