"""`hook after-stop`: create the snapshot that a policy wants after a stop. The hook starts it; users can too."""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.domain.hooks.policy import FOLDER
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.domain.hooks.policy import Policy


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("domain", metavar="DOMAIN", help="name of the domain")
    parser.add_argument(
        "--policy",
        type=Path,
        metavar="FILE",
        help=f"its policy (default: that of its UUID, else DOMAIN.toml, in {FOLDER})",
    )
    parser.add_argument(
        "--id", type=int, metavar="N", help="libvirt id of the run that has ended; a later run is not waited for"
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long to wait until the domain is shut off (default: 60)",
    )


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Wait, snapshot, prune; report to syslog, since nobody may be watching."""
    from qemu_vmdk_snap.domain.hooks import policy
    from qemu_vmdk_snap.domain.hooks import run as hooks_run
    from qemu_vmdk_snap.domain.hooks.owners import find_policy
    from qemu_vmdk_snap.errors import VmdkSnapError

    try:
        done = _snapshot(args, policy.load(args.policy or find_policy(FOLDER, args.domain)))
    except (VmdkSnapError, OSError) as error:
        hooks_run.log(f"domain {args.domain}: no snapshot after its stop: {error}", error=True)
        raise
    hooks_run.log(f"domain {args.domain}: {done['result']}")
    if ui.json_output:
        ui.json(done)
    else:
        ui.text(str(done["result"]))


def _snapshot(args: argparse.Namespace, policy: Policy) -> dict[str, object]:
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.hooks.after_stop import delete_waiting, prune_after_stop, snapshot_after_stop

    run_id = args.id if args.id is not None and args.id >= 0 else None
    with connection(policy.connect) as conn:
        if not policy.snapshot_after_stop:
            deleted = delete_waiting(conn, args.domain, run_id, args.wait)
            result = f"{', '.join(deleted) or 'nothing that waited was'} deleted after its stop"
            return {"domain": args.domain, "snapshot": None, "deleted": deleted, "result": result}
        report = snapshot_after_stop(conn, args.domain, run_id, args.wait)
        if isinstance(report, str):
            result = f"no snapshot after its stop: {report}"
            return {"domain": args.domain, "snapshot": None, "deleted": [], "result": result}
        deleted = prune_after_stop(conn, args.domain, policy.keep)
        deleted += delete_waiting(conn, args.domain, run_id, args.wait)
    result = f"snapshot {report.snapshot} taken after its stop" + (f", {', '.join(deleted)} deleted" if deleted else "")
    return {"domain": args.domain, "snapshot": report.snapshot, "deleted": deleted, "result": result}
