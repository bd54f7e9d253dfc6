"""Figures in Prometheus' text format: what promtool accepts, and what a name may have in it."""

from __future__ import annotations

import subprocess

import pytest

from qemu_vmdk_snap.cli.monitor.exposition import HELP, Sample, samples_of, text_of
from qemu_vmdk_snap.domain.monitor.figures import DiskFigures, DomainFigures

ODD = 'a "b" \\ c\nd {e}=ü'
DOMAIN = DomainFigures(
    ODD, True, 2, 100, 200, 0, {"good": 3, "note": 1, "bad": 0}, (), (DiskFigures("vda", 3, 4096, 512),), None
)


def test_every_metric_of_a_domain_is_written_once_with_its_help() -> None:
    text = text_of(samples_of(DOMAIN))
    label = 'domain="a \\"b\\" \\\\ c\\nd {e}=ü"'
    assert f"qemu_vmdk_snap_domain_snapshots{{{label}}} 2\n" in text
    assert f'qemu_vmdk_snap_domain_doctor_findings{{{label},verdict="note"}} 1\n' in text
    assert f'qemu_vmdk_snap_domain_disk_frozen_bytes{{{label},target_device="vda"}} 4096\n' in text
    named = [line.split()[2].removeprefix("qemu_vmdk_snap_") for line in text.splitlines() if line.startswith("# TYPE")]
    assert named == [metric for metric in HELP if metric.startswith("domain_")]


def test_what_could_not_be_read_is_left_out() -> None:
    """A 0 would be believed: no snapshots, no findings."""
    text = text_of(samples_of(DomainFigures("web", problem="libvirt does not answer")))
    assert [line for line in text.splitlines() if not line.startswith("#")] == [
        'qemu_vmdk_snap_domain_readable{domain="web"} 0'
    ]


@pytest.mark.needs("promtool")
def test_promtool_accepts_it() -> None:
    text = text_of(
        [*samples_of(DOMAIN), Sample("last_run_duration_seconds", (), 0.5), Sample("last_run_success", (), 1)]
    )
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
