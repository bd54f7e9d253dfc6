"""Which snapshots a policy keeps, and what a prune does to the files."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from qemu_vmdk_snap import InvalidRequest
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.delete.prune import Retention, decide, prune
from qemu_vmdk_snap.domain.registry import DiskState, SnapshotInfo, list_snapshots
from tests.domain.delete.test_delete import chain_in_xml_fits, seen, write
from tests.domain.lab import Lab, contents, xml_of

HOUR, DAY = 3600, 86400


def info(name: str, when: float, memory: str = "no") -> SnapshotInfo:
    disk = DiskState("vda", "external", None, None, None, None, None, (), None)
    return SnapshotInfo("d", name, int(when), "shutoff", None, (), 0, False, None, memory, (disk,))


def kept(policy: Retention, *snapshots: SnapshotInfo) -> dict[str, tuple[str, ...]]:
    return {one.name: one.reasons for one in decide(snapshots, policy) if one.reasons}


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


NOON = time.mktime((2026, 3, 15, 12, 0, 0, 0, 0, 0))


def test_the_last_ones() -> None:
    snapshots = [info(f"s{n}", NOON - n * HOUR) for n in range(5)]
    assert kept(Retention(last=2), *snapshots) == {"s0": ("last",), "s1": ("last",)}


def test_of_two_of_one_second_the_child_is_the_younger() -> None:
    older, younger = info("a", NOON), replace(info("b", NOON), parent="a")
    assert list(kept(Retention(last=1), older, younger)) == ["b"]
    older, younger = info("b", NOON), replace(info("a", NOON), parent="b")
    assert list(kept(Retention(last=1), older, younger)) == ["a"]


def test_the_youngest_of_each_day() -> None:
    snapshots = [info(f"s{n}", NOON - n * 8 * HOUR) for n in range(9)]  # 12, 04, 20, 12, 04, 20, 12, 04, 20
    assert list(kept(Retention(daily=3), *snapshots)) == ["s0", "s2", "s5"]


def test_periods_without_a_snapshot_do_not_count() -> None:
    snapshots = [info("now", NOON), info("week", NOON - 7 * DAY), info("year", NOON - 365 * DAY)]
    assert list(kept(Retention(daily=3), *snapshots)) == ["now", "week", "year"]
    assert list(kept(Retention(monthly=2), *snapshots)) == ["now", "year"]


def test_a_week_may_span_a_year() -> None:
    days = {day: time.mktime((*day, 12, 0, 0, 0, 0, 0)) for day in ((2025, 12, 31), (2026, 1, 2), (2025, 12, 28))}
    snapshots = [info(str(day), when) for day, when in days.items()]
    assert list(kept(Retention(weekly=5), *snapshots)) == ["(2026, 1, 2)", "(2025, 12, 28)"]


def test_each_rule_keeps_on_its_own() -> None:
    snapshots = [info("a", NOON), info("b", NOON - HOUR), info("c", NOON - DAY)]
    assert kept(Retention(last=1, hourly=2, daily=2), *snapshots) == {
        "a": ("last", "hourly", "daily"),
        "b": ("hourly",),
        "c": ("daily",),
    }


def test_what_holds_memory_is_kept() -> None:
    reasons = kept(Retention(last=1), info("a", NOON), info("m", NOON - DAY, memory="external"))
    assert reasons["m"] == ("is not an external snapshot of disks only",)


@pytest.mark.parametrize("policy", [Retention(), Retention(last=1, daily=-1)])
def test_a_policy_that_cannot_be(policy: Retention) -> None:
    with pytest.raises(InvalidRequest, match="policy: "):
        decide([info("a", NOON)], policy)


@pytest.mark.needs("libvirt", "qemu-system-x86_64")
def test_a_dry_run_tells_exactly_what_is_done(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    import libvirt

    domain = lab.define(lab.disk("a"), lab.disk("b"))
    for number in range(5):
        write(domain, number + 1)
        create_snapshot(lab.conn, domain.name(), f"s{number}")
        text = domain.snapshotLookupByName(f"s{number}").getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE)
        start, end = text.index("<creationTime>") + 14, text.index("</creationTime>")
        aged = f"{text[:start]}{int(NOON) - (5 - number) * DAY}{text[end:]}"
        domain.snapshotCreateXML(aged, 1 | 2)
    before, state = seen(lab, domain), (contents(lab.folder), xml_of(domain))
    words = ["snapshot", "prune", "-c", lab.uri, domain.name(), "--keep-last=1", "--keep-weekly=1"]
    assert main([*words, "--dry-run", "--explain", "--output=json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (contents(lab.folder), xml_of(domain)) == state
    report = prune(lab.conn, domain.name(), Retention(last=1, weekly=1))
    done = {one.name: [(work.mode, work.removed) for work in one.work] for one in report.deleted}
    assert [(one["snapshot"], [disk["mode"] for disk in one["disks"]]) for one in told["deleted"]] == [
        (name, [mode for mode, _ in work]) for name, work in done.items()
    ]
    ends = [disk["operations"][-1] for one in told["deleted"] for disk in one["disks"]]
    assert ends == [f"delete {path}" for work in done.values() for _, path in work]
    assert [one.name for one in list_snapshots(lab.conn, domain.name())] == ["s4"]
    assert seen(lab, domain) == {name: before[name] for name in ("s4", "now")}
    chain_in_xml_fits(domain)
    assert main(words) == 0
    assert capsys.readouterr().out == "Nothing to delete.\n"
    assert xml.list_disks(xml_of(domain))[0].path is not None
