"""Ranges, states and the one line of a monitoring plugin, as Nagios and compatible systems read them.

Source: Monitoring Plugins Development Guidelines (https://www.monitoring-plugins.org/doc/guidelines.html): exit status
0 to 3, thresholds as ranges, performance data after `|`.
"""

from __future__ import annotations

import enum
import math
import sys
from collections.abc import Callable, Sequence

from qemu_vmdk_snap.errors import printable
from qemu_vmdk_snap.light import Final, NamedTuple

_SECONDS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


class State(enum.IntEnum):
    """What a plugin says; the value is its exit status."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


_SEVERITY: Final = (State.OK, State.WARNING, State.UNKNOWN, State.CRITICAL)


def worst(states: Sequence[State]) -> State:
    """Return the state that counts: CRITICAL before UNKNOWN before WARNING; OK where there is none."""
    return max(states, key=_SEVERITY.index, default=State.OK)


class Range(NamedTuple):
    """`[@][START:][END]`: alerts outside of START..END, both included; with `@`, inside of it."""

    start: float
    end: float
    inside: bool
    text: str

    def alerts(self, value: float) -> bool:
        """Return whether the value raises the alert."""
        within = self.start <= value <= self.end
        return within if self.inside else not within


def parse_range(text: str, number: Callable[[str], float]) -> Range:
    """Return the range; `number` reads its bounds.

    Raises:
        ValueError: it is none.
    """
    inside = text.startswith("@")
    first, colon, second = text.removeprefix("@").rpartition(":")
    try:
        start = -math.inf if first == "~" else number(first) if colon and first else 0.0
        end = number(second) if second else math.inf
    except ValueError:
        raise ValueError(f"{text!r}: must be a range [@][START:][END], as 10, 5:, ~:7d or @10:20") from None
    if not (second or colon) or start > end:
        raise ValueError(f"{text!r}: must be a range [@][START:][END] whose START is not above its END")
    shown = f"{'@' if inside else ''}{_bound(start)}:{'' if end == math.inf else _bound(end)}"
    return Range(start, end, inside, shown.removeprefix("0:") if end != math.inf and not inside else shown)


def seconds(text: str) -> float:
    """Return the seconds that `text` means: `90`, `30m`, `12h`, `7d`, `2w`.

    Raises:
        ValueError: it is not such a number.
    """
    unit = text[-1:].lower()
    return _plain(text[:-1]) * _SECONDS[unit] if unit in _SECONDS else _plain(text)


def size(text: str) -> float:
    """Return the bytes that `text` means: `512`, `64K`, `1.5G` (powers of 1024).

    Raises:
        ValueError: it is not such a number.
    """
    from qemu_vmdk_snap.units import parse_size

    return float(parse_size(text))


def count(text: str) -> float:
    """Return the number.

    Raises:
        ValueError: it is none.
    """
    return _plain(text)


def _plain(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _bound(value: float) -> str:
    return "~" if value == -math.inf else f"{value:.15g}"


class Perf(NamedTuple):
    """One figure of the performance data."""

    label: str
    value: float
    unit: str = ""
    warning: Range | None = None
    critical: Range | None = None

    def __str__(self) -> str:
        """Return `'label'=value[unit];warn;crit;min`; a quote in the label is doubled, `=` and `|` cannot be in one."""
        label = self.label.replace("'", "''").replace("=", "_").replace("|", "_")
        bounds = [one.text if one is not None else "" for one in (self.warning, self.critical)]
        return f"'{label}'={self.value:.15g}{self.unit};{';'.join(bounds)};0"


def judged(value: float, warning: Range | None, critical: Range | None) -> State:
    """Return the state of one figure."""
    if critical is not None and critical.alerts(value):
        return State.CRITICAL
    return State.WARNING if warning is not None and warning.alerts(value) else State.OK


def line_of(state: State, text: str, figures: Sequence[Perf] = ()) -> str:
    """Return the plugin's first line; `|` would begin the performance data."""
    said = f"VMDK_SNAP {state.name} - {' '.join(text.split()).replace('|', '/')}"
    return f"{said} |{' '.join(map(str, figures))}" if figures else said


def failed(message: str) -> int:
    """Print that the plugin could not do its work, and return the exit status that says so."""
    sys.stdout.write(line_of(State.UNKNOWN, printable(message)) + "\n")
    sys.stdout.flush()
    return State.UNKNOWN
