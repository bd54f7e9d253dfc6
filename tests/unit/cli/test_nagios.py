"""Ranges, states and the line of the monitoring plugin."""

from __future__ import annotations

import pytest

from qemu_vmdk_snap.cli.monitor.nagios import (
    Perf,
    State,
    count,
    judged,
    line_of,
    parse_range,
    seconds,
    size,
    worst,
)


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [  # the table of the guidelines
        ("10", (0, 5, 10), (-1, 10.5)),
        ("10:", (10, 1e9), (9.9, -1)),
        ("~:10", (-1e9, 10), (10.1,)),
        ("10:20", (10, 20), (9, 21)),
        ("@10:20", (9, 21), (10, 15, 20)),
        ("0", (0,), (1,)),
    ],
)
def test_a_range_alerts_outside_of_it(text: str, good: tuple[float, ...], bad: tuple[float, ...]) -> None:
    limits = parse_range(text, count)
    assert [limits.alerts(value) for value in good] == [False] * len(good)
    assert [limits.alerts(value) for value in bad] == [True] * len(bad)
    assert parse_range(limits.text, count) == limits  # as it stands in the performance data


@pytest.mark.parametrize("text", ["", "@", "x", "20:10", "nan", "1:inf", "1h", "10:20:30"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a range"):
        parse_range(text, count)


def test_units() -> None:
    assert parse_range("1h:7d", seconds)[:2] == (3600, 604800)
    assert parse_range("2w", seconds).text == "1209600"
    assert parse_range("1.5K:1G", size)[:2] == (1536, 1 << 30)
    with pytest.raises(ValueError, match="must be a range"):
        parse_range("7d", size)


def test_critical_counts_before_unknown_before_warning() -> None:
    assert worst([]) is State.OK
    assert worst([State.WARNING, State.OK]) is State.WARNING
    assert worst([State.UNKNOWN, State.WARNING]) is State.UNKNOWN
    assert worst([State.UNKNOWN, State.CRITICAL]) is State.CRITICAL
    warning, critical = parse_range("5", count), parse_range("10", count)
    assert [judged(value, warning, critical) for value in (5, 6, 11)] == [State.OK, State.WARNING, State.CRITICAL]


def test_the_line_keeps_its_one_bar() -> None:
    perf = Perf("it's a=b|c vda", 3, "B", parse_range("5", count), parse_range("@1:2", count))
    assert line_of(State.OK, "a\nb|c", [perf]) == "VMDK_SNAP OK - a b/c |'it''s a_b_c vda'=3B;5;@1:2;0"
    assert line_of(State.UNKNOWN, "no") == "VMDK_SNAP UNKNOWN - no"
