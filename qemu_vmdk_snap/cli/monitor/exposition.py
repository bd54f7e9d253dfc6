"""Figures in Prometheus' text format.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/ (text format 0.0.4). Labels are what a host has few
of: domains, targets of disks and verdicts; never names of snapshots or paths, which are unlimited.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from qemu_vmdk_snap.light import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from qemu_vmdk_snap.domain.monitor.figures import DomainFigures

_PREFIX: Final = "qemu_vmdk_snap_"

HELP: Final = {
    "build_info": "Always 1; the label has the version of the program that wrote this.",
    "last_run_timestamp_seconds": "When these metrics were collected, in seconds since 1970.",
    "last_run_duration_seconds": "How long collecting them took.",
    "last_run_success": "Whether libvirt answered and every domain could be read (1) or not (0).",
    "domain_readable": "Whether the domain, its snapshots and its disks could be read (1) or not (0).",
    "domain_snapshots": "How many snapshots the domain has, whoever made them.",
    "domain_oldest_snapshot_timestamp_seconds": "When the domain's oldest snapshot was created; absent without one.",
    "domain_newest_snapshot_timestamp_seconds": "When the domain's newest snapshot was created; absent without one.",
    "domain_interrupted_operations": "Operations on the domain's snapshots that have begun and not ended.",
    "domain_doctor_findings": "Findings of doctor by their verdict.",
    "domain_disk_chain_depth": "How many links the chain of the disk has, its active overlay included.",
    "domain_disk_frozen_bytes": "What the links below the active overlay take up on their file system.",
    "domain_disk_overlay_bytes": "What the active overlay takes up: what was written since the newest snapshot.",
}
"""Every metric, in the order in which they are written. All are gauges."""


class Sample(NamedTuple):
    """One line: a metric without the prefix, its labels, its value."""

    metric: str
    labels: tuple[tuple[str, str], ...]
    value: float


def samples_of(domain: DomainFigures) -> Iterator[Sample]:
    """Yield the samples of one domain. What could not be read is left out, so that no alert sees a false 0."""
    own = (("domain", domain.name),)
    yield Sample("domain_readable", own, int(domain.problem is None))
    if domain.read_snapshots:
        yield Sample("domain_snapshots", own, domain.snapshots)
        yield Sample("domain_interrupted_operations", own, domain.interrupted)
    if domain.oldest is not None:
        yield Sample("domain_oldest_snapshot_timestamp_seconds", own, domain.oldest)
    if domain.newest is not None:
        yield Sample("domain_newest_snapshot_timestamp_seconds", own, domain.newest)
    for verdict, count in domain.findings.items():
        yield Sample("domain_doctor_findings", (*own, ("verdict", verdict)), count)
    for disk in domain.disks:
        labels = (*own, ("target_device", disk.target))
        yield Sample("domain_disk_chain_depth", labels, disk.depth)
        yield Sample("domain_disk_frozen_bytes", labels, disk.frozen_bytes)
        yield Sample("domain_disk_overlay_bytes", labels, disk.overlay_bytes)


def text_of(samples: Iterable[Sample]) -> str:
    """Return the samples as a whole exposition, grouped by metric as the format asks."""
    groups: dict[str, list[Sample]] = {metric: [] for metric in HELP}
    for sample in samples:
        groups[sample.metric].append(sample)
    return "".join(_group(metric, group) for metric, group in groups.items() if group)


def _group(metric: str, samples: Sequence[Sample]) -> str:
    name = f"{_PREFIX}{metric}"
    lines = [f"# HELP {name} {HELP[metric]}", f"# TYPE {name} gauge"]
    lines += [f"{name}{_labels(sample.labels)} {_number(sample.value)}" for sample in samples]
    return "\n".join(lines) + "\n"


def _labels(labels: Sequence[tuple[str, str]]) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels) + "}" if labels else ""


def _escaped(value: str) -> str:
    r"""Escape `\`, `"` and a line's end. What is no Unicode (libvirt allows any bytes in a name) is replaced."""
    text = value.encode("utf-8", "replace").decode("utf-8")
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
