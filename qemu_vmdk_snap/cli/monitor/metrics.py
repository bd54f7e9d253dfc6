"""`metrics`: what Prometheus scrapes through node_exporter's textfile collector."""

from __future__ import annotations

import time
from pathlib import Path

from qemu_vmdk_snap.cli.monitor.options import add_connection, add_domains
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import VmdkSnapError
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.cli.monitor.exposition import Sample


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_connection(parser, "-c")
    parser.add_argument(
        "--textfile",
        type=Path,
        metavar="FILE",
        help="write them to FILE, in one step and readable for all, instead of to standard output",
    )
    parser.add_argument(
        "--no-doctor", dest="doctor", action="store_false", help="leave out the findings of doctor, which take longest"
    )
    add_domains(parser)


def run(args: argparse.Namespace, ui: Ui) -> int:
    """Collect and show; return 1 where something could not be read. What could be is shown all the same."""
    from qemu_vmdk_snap.cli.exit_status import status_of
    from qemu_vmdk_snap.cli.monitor.exposition import Sample, samples_of
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.monitor.figures import read_figures
    from qemu_vmdk_snap.domain.registry import list_domains

    began, clock = time.time(), time.monotonic()
    samples: list[Sample] = []
    status = 0
    try:
        with connection(args.connect) as conn:
            names = args.domains or list_domains(conn)
            for domain in read_figures(conn, names, doctor=args.doctor):
                samples += samples_of(domain)
                if domain.problem is not None:
                    ui.warn(f"domain {domain.name}: {domain.problem}")
                    status = 1
    except VmdkSnapError as error:  # monitoring is to see that nothing could be read, not the figures of yesterday
        ui.error(error)
        status = status_of(error)
    samples += [
        Sample("last_run_timestamp_seconds", (), round(began, 3)),
        Sample("last_run_duration_seconds", (), round(time.monotonic() - clock, 3)),
        Sample("last_run_success", (), int(status == 0)),
    ]
    _show(samples, args, ui)
    return status


def _show(samples: list[Sample], args: argparse.Namespace, ui: Ui) -> None:
    from qemu_vmdk_snap import __version__, replace_file
    from qemu_vmdk_snap.cli.monitor.exposition import Sample, text_of

    text = text_of([Sample("build_info", (("version", __version__),), 1), *samples])
    if args.textfile is not None:
        replace_file(args.textfile, text.encode(), mode=0o644)
    if ui.json_output:
        ui.json({"samples": [_object(sample) for sample in samples]})
    elif args.textfile is None:
        for line in text.splitlines():
            ui.text(line)


def _object(sample: Sample) -> dict[str, object]:
    """Return the sample for programs, with the keys that other commands have."""
    labels = {"target" if name == "target_device" else name: value for name, value in sample.labels}
    return {"metric": sample.metric, **labels, "value": sample.value}
