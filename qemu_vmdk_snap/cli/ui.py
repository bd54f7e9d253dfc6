"""What the user sees: text, JSON, a progress line on a terminal, and one line for an error."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence

from qemu_vmdk_snap.errors import printable
from qemu_vmdk_snap.light import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from qemu_vmdk_snap.ops.progress import Progress

_PROGRESS_AFTER: Final = 1.0
_PROGRESS_EVERY: Final = 0.1


class Ui:
    """The only place that writes to the user. `json_output` is what `--output=json` asked for."""

    def __init__(self, *, json_output: bool = False, quiet: bool = False, progress: bool = False) -> None:
        self.json_output = json_output
        self.quiet = quiet
        self._progress_wanted = progress
        self._terminal = sys.stderr.isatty()
        self._started = time.monotonic()
        self._last_progress = 0.0
        self._progress_open = False
        self._step: Progress | None = None
        self._streams = False
        self._answered = False
        self._warned: dict[str, None] = {}  # in their order

    def text(self, line: str = "") -> None:
        """Print one line of the answer; empty lines may be before and after it."""
        self._end_progress()
        if not self.quiet:
            inner = line.strip("\n")
            before, after = line.partition(inner)[::2] if inner else ("", line)
            sys.stdout.write(f"{before}{printable(inner)}{after}\n")

    def json(self, value: object) -> None:
        """Print `value` as the JSON answer, indented as qemu-img does.

        An object also has what was warned about so far, as the list `warnings`.
        """
        import json

        self._end_progress()
        self._answered = True
        if self._warned and isinstance(value, dict) and "warnings" not in value:
            value = {**value, "warnings": list(self._warned)}
        sys.stdout.write(json.dumps(value, indent=4, default=str) + "\n")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print `rows` in columns under `header`, as wide as their widest cell on a terminal."""
        cells = [[printable(str(cell)) for cell in row] for row in rows]
        widths = [max(columns(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
        rule = "-" * (sum(widths) + 3 * (len(widths) - 1))
        for i, row in enumerate([list(header), [rule], *cells]):
            padded = [] if i == 1 else [c + " " * (w - columns(c)) for c, w in zip(row, widths, strict=True)]
            self.text(rule if i == 1 else "   ".join(padded).rstrip())

    def progress(self, step: Progress) -> None:
        """Show the progress of an operation: at once with `-p`, else on a terminal if it takes over a second."""
        now, self._step = time.monotonic(), step
        shown = self._progress_wanted or (self._terminal and now - self._started > _PROGRESS_AFTER)
        whole = step.done >= step.total
        if self.quiet or self.json_output or not shown or (not whole and now - self._last_progress < _PROGRESS_EVERY):
            return
        self._last_progress = now
        sys.stderr.write(f"\r{_percent(step)}")
        sys.stderr.flush()
        self._progress_open = True

    def tell_progress(self) -> None:
        """Show how far the operation is, on a line of its own: somebody has asked (SIGUSR1)."""
        self._end_progress()
        sys.stderr.write(f"{_percent(self._step)}\n")
        sys.stderr.flush()

    def end(self) -> None:
        """End the line of the progress, if one is open: nothing more will be written."""
        self._end_progress()

    def warn(self, message: str) -> None:
        """Print one line on standard error that does not end the command; the same line is printed once."""
        line = printable(message)
        if line in self._warned:
            return
        self._warned[line] = None
        self._end_progress()
        sys.stderr.write(f"qemu-vmdk-snap: warning: {line}\n")

    def remark(self, message: str) -> None:
        """Print one line on standard error that is not about the answer; `-q` leaves it out."""
        self._end_progress()
        if not self.quiet:
            sys.stderr.write(f"qemu-vmdk-snap: note: {printable(message)}\n")

    def streams(self) -> None:
        """Note that the answer is written to standard output piece by piece: nothing else may be written there."""
        self._streams = True

    def error(self, message: object, error: BaseException | None = None, status: int = 1) -> None:
        """Print the error in one line; with JSON output it is on standard output too.

        If an answer was printed already, that is the only JSON value; it contains what failed.
        """
        self._end_progress()
        line = printable(" ".join(str(message).split("\n")))
        sys.stderr.write(f"qemu-vmdk-snap: {line}\n")
        if self.json_output and error is not None and not self._streams and not self._answered:
            from qemu_vmdk_snap.cli.exit_status import as_object

            self.json(as_object(error, line, status))

    def _end_progress(self) -> None:
        if self._progress_open:
            sys.stderr.write("\n")
            self._progress_open = False


def _percent(step: Progress | None) -> str:
    if step is None:
        return f"    ({0:.2f}/100%)"
    percent = 100.0 * step.done / step.total if step.total else 100.0
    return f"    ({percent:.2f}/100%) {step.stage:<8}"


def columns(text: str) -> int:
    """Return how many columns of a terminal `text` takes: two for a wide character, none for a combining one."""
    if text.isascii():
        return len(text)
    import unicodedata

    wide = sum(unicodedata.east_asian_width(char) in ("W", "F") for char in text)
    return len(text) + wide - sum(unicodedata.category(char) in ("Mn", "Me", "Cf") for char in text)


def keyed(pairs: Mapping[str, object]) -> list[str]:
    """Return `pairs` as `key: value` lines, keys padded to one width."""
    width = max((len(key) for key in pairs), default=0) + 1
    return [f"{key + ':':<{width}} {value}" for key, value in pairs.items()]
