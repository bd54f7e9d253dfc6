"""`doctor`: check this host, or one domain; repair it, remove or adopt orphans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from qemu_vmdk_snap.cli.image.common import add_allow_dir
from qemu_vmdk_snap.cli.snapshot.options import add_all, add_orphans
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import InvalidRequest, VmdkSnapError
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.domain.adopt.run import Settled
    from qemu_vmdk_snap.domain.doctor.check import Check


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("-c", "--connect", metavar="URI", help="libvirt connection, as for the snapshot commands")
    parser.add_argument("domain", metavar="DOMAIN", nargs="?", help="name, id or UUID of a domain (default: the host)")
    add_all(parser)
    add_allow_dir(parser)
    parser.add_argument(
        "--repair",
        action="store_true",
        help="repair what is found: relink CIDs, complete chains in the XML, register snapshots again",
    )
    parser.add_argument("--remove", action="store_true", help="remove orphaned overlays that store nothing")
    parser.add_argument(
        "--discard",
        type=Path,
        metavar="FILE",
        action="append",
        default=[],
        help="remove this orphaned overlay with its data (may be repeated)",
    )
    add_orphans(parser)
    parser.add_argument("--adopt", action="store_true", help="register every orphaned overlay as a snapshot")


def run(args: argparse.Namespace, ui: Ui) -> int:
    """Remove or adopt orphans if requested, then show every check; exit status 1 if something is bad."""
    if args.domain is None and (args.repair or args.remove or args.discard or args.adopt):
        raise InvalidRequest("--repair, --remove, --discard, --adopt", "need a domain")
    if args.all:
        if args.domain is not None:
            raise InvalidRequest("doctor", "takes either a domain or --all")
        return _check_all(args, ui)
    done: list[Settled] = []
    repaired: list[str] = []
    if args.domain is None:
        checks = [*_host(args.connect)]
    else:
        from qemu_vmdk_snap.domain.adopt.run import settle_orphans
        from qemu_vmdk_snap.domain.connect import connection
        from qemu_vmdk_snap.domain.doctor.domain import check_domain, repair_domain

        with connection(args.connect) as conn:
            if args.repair:
                repaired = repair_domain(conn, args.domain)
            if args.remove or args.discard or args.adopt:
                given = [path.absolute() for path in args.discard]
                done = settle_orphans(
                    conn,
                    args.domain,
                    discard=given,
                    remove=args.remove,
                    adopt=args.adopt,
                    orphans=[path.absolute() for path in args.orphan],
                )
            checks = [*check_domain(conn, args.domain)]
    good = not any(check.verdict == "bad" for check in checks)
    if ui.json_output:
        shown = [check.as_dict() for check in checks]
        ui.json({"good": good, "repaired": repaired, "done": [one.as_dict() for one in done], "checks": shown})
        return 0 if good else 1
    for line in repaired:
        ui.text(f"repaired: {line}")
    for one in done:
        ui.text(f"removed {one.path}" if one.snapshot is None else f"adopted {one.path} as snapshot {one.snapshot}")
    _show(checks, ui)
    return 0 if good else 1


def _show(checks: Sequence[Check], ui: Ui) -> None:
    for check in checks:
        ui.text(f"[{check.verdict:^4}] {check.subject}: {check.text}")


def _check_all(args: argparse.Namespace, ui: Ui) -> int:
    """Show the checks of every domain; one that cannot be checked is bad, and the others are checked."""
    from qemu_vmdk_snap.cli.exit_status import as_object, one_line, status_of
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.doctor.domain import check_domain
    from qemu_vmdk_snap.domain.registry import list_domains

    domains: list[dict[str, object]] = []
    with connection(args.connect) as conn:
        for name in list_domains(conn):
            try:
                checks = [*check_domain(conn, name)]
            except (VmdkSnapError, OSError) as error:
                ui.error(one_line(error))
                domains.append({"domain": name, "good": False, **as_object(error, one_line(error), status_of(error))})
                continue
            good = not any(check.verdict == "bad" for check in checks)
            domains.append({"domain": name, "good": good, "checks": [check.as_dict() for check in checks]})
            if not ui.json_output:
                ui.text(f"Domain {name}:")
                _show(checks, ui)
                ui.text()
    good = all(one["good"] for one in domains)
    if ui.json_output:
        ui.json({"good": good, "domains": domains})
    return 0 if good else 1


def _host(uri: str | None) -> Iterator[Check]:
    from qemu_vmdk_snap.domain.doctor.check import Check
    from qemu_vmdk_snap.domain.doctor.host import check_host
    from qemu_vmdk_snap.harness.accelerator import choose_accelerator

    yield from check_host(uri)
    if not Path("/dev/kvm").exists():
        yield Check("KVM", "note", "there is no /dev/kvm: guests run under TCG, slowly")
    elif choose_accelerator() == "kvm":
        yield Check("KVM", "good", "boots a guest faster than TCG")
    else:
        yield Check("KVM", "note", "/dev/kvm is there, but cannot be used or boots a guest no faster than TCG")
