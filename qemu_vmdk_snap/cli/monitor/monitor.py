"""`monitor`: a plugin for Nagios, Icinga and compatible systems. Its exit status is 0 to 3."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from qemu_vmdk_snap import __version__
from qemu_vmdk_snap.cli.monitor.nagios import (
    Perf,
    Range,
    State,
    count,
    failed,
    judged,
    line_of,
    parse_range,
    seconds,
    size,
    worst,
)
from qemu_vmdk_snap.cli.monitor.options import add_connection, add_domains
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import InvalidRequest, VmdkSnapError, printable
from qemu_vmdk_snap.light import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.domain.monitor.figures import DomainFigures

MODES: Final[dict[str, tuple[str, Callable[[str], float]]]] = {
    "age": ("how old the oldest snapshot is (with --newest: the newest)", seconds),
    "count": ("how many snapshots a domain has", count),
    "depth": ("how many links the chain of a disk has", count),
    "overlay-size": ("how many bytes the active overlay of a disk takes up", size),
    "doctor": ("how many bad findings doctor has (critical above 0, unless thresholds are given)", count),
}
_DEADLINE: Final = 30.0


class Judged(NamedTuple):
    """One figure of one domain: its state, what is said of it, and its performance data if it has a value."""

    state: State
    text: str
    perf: Perf | None


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; their letters are those of all such plugins."""
    modes = "; ".join(f"{name}: {text}" for name, (text, _) in MODES.items())
    parser.add_argument("mode", metavar="MODE", choices=tuple(MODES), help=modes)
    add_domains(parser)
    add_connection(parser)
    units = "ages take s, m, h, d and w, sizes K, M, G and T"
    parser.add_argument("-w", "--warning", metavar="RANGE", help=f"warn outside of it: [@][START:][END]; {units}")
    parser.add_argument("-c", "--critical", metavar="RANGE", help="critical outside of it")
    parser.add_argument(
        "-t", "--timeout", type=float, default=_DEADLINE, metavar="SECONDS", help="UNKNOWN after it (default: 30)"
    )
    parser.add_argument("-v", "--verbose", action="count", default=0, help="add a line for each figure or finding")
    parser.add_argument("-V", "--version", action="version", version=f"qemu-vmdk-snap monitor {__version__}")
    parser.add_argument(
        "--newest", action="store_true", help="age: of the newest snapshot; a domain without one is too old"
    )


def run(args: argparse.Namespace, ui: Ui) -> int:
    """Read, judge, and say it in one line."""
    watch = threading.Timer(args.timeout, _too_late, (args.timeout,))
    watch.daemon = True
    watch.start()
    try:
        return _run(args, ui)
    except (VmdkSnapError, OSError) as error:
        from qemu_vmdk_snap.cli.exit_status import one_line

        return failed(one_line(error))
    except Exception as error:  # a plugin that ends in a traceback would be taken for a WARNING (status 1)
        return failed(f"{type(error).__name__}: {error}")
    finally:
        watch.cancel()


def _run(args: argparse.Namespace, ui: Ui) -> int:
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.monitor.figures import read_figures
    from qemu_vmdk_snap.domain.registry import list_domains

    warning, critical = (_range(text, args.mode) for text in (args.warning, args.critical))
    if args.mode == "doctor" and warning is None and critical is None:
        critical = parse_range("0", count)
    with connection(args.connect) as conn:
        names = args.domains or list_domains(conn)
        figures = read_figures(conn, names, doctor=args.mode == "doctor", disks=args.mode in ("depth", "overlay-size"))
    found = [one for domain in figures for one in _judge(domain, args, warning, critical)]
    state = worst([one.state for one in found])
    alerts = [one.text for one in found if one.state is state and state is not State.OK]
    good = f"{args.mode} of {len(figures)} domain{'s' if len(figures) != 1 else ''} within its thresholds"
    text = "; ".join(alerts) or good
    perfs = [one.perf for one in found if one.perf is not None]
    if ui.json_output:
        rows = [{"state": one.state.name, "text": one.text, **_value(one.perf)} for one in found]
        ui.json({"state": state.name, "mode": args.mode, "results": rows})
        return state
    ui.text(line_of(state, printable(text), perfs))
    if args.verbose:
        for one in found:
            ui.text(f"{one.state.name}: {one.text}".replace("|", "/"))
        for domain in figures:
            for finding in domain.bad:
                ui.text(f"{domain.name}: {finding}".replace("|", "/"))
    return state


def _judge(
    domain: DomainFigures, args: argparse.Namespace, warning: Range | None, critical: Range | None
) -> list[Judged]:
    found = [
        Judged(judged(value, warning, critical), f"{label}: {shown}", Perf(label, value, unit, warning, critical))
        for label, value, unit, shown in _values(domain, args)
    ]
    if args.mode == "age" and args.newest and domain.read_snapshots and domain.newest is None:
        state = State.CRITICAL if critical is not None else State.WARNING if warning is not None else State.OK
        found.append(Judged(state, f"{domain.name}: has no snapshot", None))
    if domain.problem is not None:
        found.append(Judged(State.UNKNOWN, f"{domain.name}: {domain.problem}", None))
    return found


def _values(domain: DomainFigures, args: argparse.Namespace) -> list[tuple[str, float, str, str]]:
    """Return the figures that the mode asks for: label, value, unit of the performance data, and in words."""
    from qemu_vmdk_snap.domain.monitor.figures import age_of
    from qemu_vmdk_snap.units import format_size

    if args.mode == "age":
        which = "newest" if args.newest else "oldest"
        created = domain.newest if args.newest else domain.oldest
        if created is None:
            return []
        age = float(int(age_of(created, time.time())))
        return [(domain.name, age, "s", f"{which} snapshot is {_duration(age)} old")]
    if args.mode == "count" and domain.read_snapshots:
        return [(domain.name, domain.snapshots, "", _number(domain.snapshots, "snapshot"))]
    if args.mode == "doctor" and domain.findings:
        bad = domain.findings["bad"]
        return [(domain.name, bad, "", f"{_number(bad, 'bad finding')}{_first(domain)}")]
    if args.mode == "depth":
        return [(f"{domain.name} {disk.target}", disk.depth, "", f"chain of {disk.depth}") for disk in domain.disks]
    if args.mode == "overlay-size":
        return [
            (f"{domain.name} {disk.target}", disk.overlay_bytes, "B", f"overlay of {format_size(disk.overlay_bytes)}")
            for disk in domain.disks
        ]
    return []


def _first(domain: DomainFigures) -> str:
    return f": {domain.bad[0]}" if domain.bad else ""


def _range(text: str | None, mode: str) -> Range | None:
    if text is None:
        return None
    try:
        return parse_range(text, MODES[mode][1])
    except ValueError as error:
        raise InvalidRequest("threshold", str(error)) from None


def _value(perf: Perf | None) -> dict[str, object]:
    return {} if perf is None else {"label": perf.label, "value": perf.value, "unit": perf.unit}


def _number(value: int, what: str) -> str:
    return f"{value} {what}{'' if value == 1 else 's'}"


def _duration(age: float) -> str:
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if age >= 2 * length:
            return f"{age / length:.1f} {unit}"
    return f"{age:.0f} s"


def _too_late(after: float) -> None:
    """End the process: libvirt may never answer, and nothing else would end its call."""
    failed(f"no answer within {after:g} s")
    os._exit(State.UNKNOWN)
