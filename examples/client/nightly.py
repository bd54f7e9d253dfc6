"""A client of the public interface: snapshot every domain at night, keep a week, and check the images.

    python nightly.py [URI]

One JSON object for each domain goes to standard output. The exit status is 1 if a domain failed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from qemu_vmdk_snap import CheckReport, Severity, SnapshotExists, VmdkSnapError, check_image
from qemu_vmdk_snap.domain import (
    PruneReport,
    Retention,
    SnapshotReport,
    connection,
    create_snapshot,
    list_domains,
    prune_snapshots,
)


def corruptions(image: Path) -> list[str]:
    """Return what is damaged in the image and its chain, one line each."""
    report: CheckReport = check_image(image, whole_chain=True, lock=False)
    return [str(finding) for finding in report.findings if finding.severity is Severity.CORRUPTION]


def main(uri: str | None = None) -> int:
    """Do it, and return the exit status."""
    failed = False
    with connection(uri) as conn:
        for domain in list_domains(conn):
            answer: dict[str, object] = {"domain": domain}
            try:
                report: SnapshotReport = create_snapshot(conn, domain, time.strftime("night-%Y-%m-%d"), quiesce="auto")
                pruned: PruneReport = prune_snapshots(conn, domain, Retention(daily=7, weekly=4))
                answer |= {"snapshot": report.as_dict(), "deleted": pruned.as_dict()["deleted"]}
                answer["damaged"] = [line for disk in report.disks for line in corruptions(disk.frozen)]
            except SnapshotExists:
                answer["changed"] = False
            except VmdkSnapError as error:
                answer |= {"code": error.code, "message": str(error)}
                failed = True
            print(json.dumps(answer))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
