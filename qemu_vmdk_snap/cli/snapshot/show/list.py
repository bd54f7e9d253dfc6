"""`snapshot list`: the snapshots of a domain, as a table, as names, or as a tree."""

from __future__ import annotations

import time
from collections.abc import Sequence

from qemu_vmdk_snap.cli.snapshot.options import add_domain, warn_pending
from qemu_vmdk_snap.cli.snapshot.show.choose import add_choice, choose
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import InvalidRequest, VmdkSnapError
from qemu_vmdk_snap.light import TYPE_CHECKING
from qemu_vmdk_snap.units import format_size

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.domain.registry import SnapshotInfo


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_domain(parser, or_all=True)
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--tree", action="store_true", help="list the snapshots as a tree")
    shape.add_argument("--name", action="store_true", help="print only names")
    shape.add_argument("--parent", action="store_true", help="add a column with the parent")
    shape.add_argument(
        "--sizes", action="store_true", help="add columns with the size of the frozen files and the depth of the chain"
    )
    add_choice(parser)


def run(args: argparse.Namespace, ui: Ui) -> int:
    """Show the snapshots."""
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.journal.pending import pending_line
    from qemu_vmdk_snap.domain.registry import list_snapshots

    if (args.domain is None) is not args.all:
        raise InvalidRequest("snapshot list", "needs either a domain or --all")
    if args.all:
        return _list_all(args, ui)
    with connection(args.connect) as conn:
        warn_pending(pending_line(conn, args.domain), ui)
        snapshots = choose(list_snapshots(conn, args.domain), args)
    if ui.json_output:
        ui.json([snapshot.as_dict() for snapshot in snapshots])
    else:
        _show(snapshots, args, ui)
    return 0


def _list_all(args: argparse.Namespace, ui: Ui) -> int:
    """Show the snapshots of every domain; return the exit status of the first domain that fails, or 0."""
    from qemu_vmdk_snap.cli.exit_status import as_object, one_line, status_of
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.journal.pending import pending_line
    from qemu_vmdk_snap.domain.registry import list_domains, list_snapshots

    answer: list[dict[str, object]] = []
    first = 0
    with connection(args.connect) as conn:
        for name in list_domains(conn):
            try:
                warn_pending(pending_line(conn, name), ui)
                snapshots = choose(list_snapshots(conn, name), args)
            except (VmdkSnapError, OSError) as error:
                status = status_of(error)
                first = first or status
                ui.error(one_line(error))
                answer.append({"domain": name, **as_object(error, one_line(error), status)})
                continue
            answer.append({"domain": name, "snapshots": [snapshot.as_dict() for snapshot in snapshots]})
            if not ui.json_output:
                ui.text(f"Domain {name}:")
                _show(snapshots, args, ui)
                ui.text()
    if ui.json_output:
        ui.json(answer)
    return first


def _show(snapshots: Sequence[SnapshotInfo], args: argparse.Namespace, ui: Ui) -> None:
    from qemu_vmdk_snap.domain.registry import tree_lines

    if args.tree:
        for line in tree_lines(snapshots):
            ui.text(line)
    elif args.name:
        for snapshot in snapshots:
            ui.text(snapshot.name)
    else:
        _table(snapshots, ui, with_parent=args.parent, with_sizes=args.sizes)


def _table(snapshots: Sequence[SnapshotInfo], ui: Ui, *, with_parent: bool, with_sizes: bool) -> None:
    header = ["Name", "Creation Time", "State", *(["Parent"] if with_parent else [])]
    header += ["Frozen", "Depth"] if with_sizes else []
    with_foreign = any(snapshot.foreign for snapshot in snapshots)
    header += ["Foreign"] if with_foreign else []
    rows = []
    for snapshot in snapshots:
        created = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(snapshot.creation_time))
        rows.append([snapshot.name, created, snapshot.state, *([snapshot.parent or ""] if with_parent else [])])
        if with_sizes:
            frozen = [disk.frozen_bytes for disk in snapshot.disks if disk.frozen_bytes is not None]
            depths = [disk.depth for disk in snapshot.disks if disk.depth is not None]
            rows[-1] += [format_size(sum(frozen)) if frozen else "-", str(max(depths)) if depths else "-"]
        rows[-1] += [snapshot.foreign or ""] if with_foreign else []
    ui.table(header, rows)
