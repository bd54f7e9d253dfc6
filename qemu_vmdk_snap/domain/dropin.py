"""Drop-ins: the user's executables that run before and after an operation on a domain's snapshots.

Every executable in `/etc/qemu-vmdk-snap/hooks.d` (or in `QEMU_VMDK_SNAP_HOOKS`) runs, in the order of their names:

    NAME before OPERATION DOMAIN     a failure aborts the operation, with nothing done
    NAME after OPERATION DOMAIN      in the opposite order; a failure is only reported

OPERATION is create, revert or delete. Standard input is a JSON object: `phase`, `operation`, `domain`, `plan` (what the
operation does), and `after`, `result` (`done`, `failed`, or `aborted` by another executable) and `reason`. One that was
called before is called after in any case, so that it can thaw what it froze. Each has its own deadline.
`LIBVIRT_DEFAULT_URI` names the connection. The domain's snapshots are locked meanwhile: a drop-in must not change them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from qemu_vmdk_snap.domain.trust import distrust
from qemu_vmdk_snap.errors import InvalidRequest, PluginError

FOLDER: Final = Path("/etc/qemu-vmdk-snap/hooks.d")
FOLDER_VARIABLE: Final = "QEMU_VMDK_SNAP_HOOKS"
DEADLINE_VARIABLE: Final = "QEMU_VMDK_SNAP_HOOKS_DEADLINE"
DEFAULT_DEADLINE: Final = 60.0

_log = logging.getLogger(__name__)

Operation = Literal["create", "revert", "delete"]
Phase = Literal["before", "after"]


@dataclass(frozen=True, slots=True)
class _Call:
    operation: Operation
    domain: str
    plan: Mapping[str, object]
    environ: Mapping[str, str]
    deadline: float
    """Seconds."""

    def ask(self, path: Path) -> None:
        """Run one executable before the operation; raises PluginError if it fails."""
        complaint = self.run(path, "before")
        if complaint is not None:
            raise PluginError(str(path), complaint)

    def run(self, path: Path, phase: Phase, **outcome: str | None) -> str | None:
        """Run one executable; return None if it succeeds, else the failure in one line."""
        _log.info("drop-in %s: %s %s of domain %s", path, phase, self.operation, self.domain)
        words = {"phase": phase, "operation": self.operation, "domain": self.domain, **outcome, "plan": self.plan}
        # Files, not pipes: an executable that does not read, or leaves a process running, does not block us.
        with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as said:
            told.write(json.dumps(words, default=str).encode() + b"\n")
            told.seek(0)
            try:
                status = self._wait(path, phase, told.fileno(), said.fileno())
            except OSError as error:
                return f"cannot be run: {error.strerror}"
            if status is None:
                return f"{phase} {self.operation}: did not end within {self.deadline:g} s"
            if not status:
                return None
            said.seek(0)
            lines = said.read(65536).decode(errors="replace").split("\n")
        last = next((" ".join(line.split()) for line in reversed(lines) if line.strip()), "no output")
        how = f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
        return f"{phase} {self.operation}: {how}: {last}"

    def _wait(self, path: Path, phase: Phase, told: int, said: int) -> int | None:
        process = subprocess.Popen(
            [path, phase, self.operation, self.domain],
            stdin=told,
            stdout=said,
            stderr=said,
            env=dict(self.environ),
            start_new_session=True,
        )
        try:
            return process.wait(self.deadline)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return None
            raise


def folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where the executables are."""
    return Path(environ.get(FOLDER_VARIABLE) or FOLDER)


def executables(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Return the executables in the order in which they run; hidden files and editors' backups are ignored.

    Raises:
        PluginError: one of them, or a folder in its path, may be written by others than root or this user.
    """
    place = folder(environ)
    try:
        paths = sorted(place.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [path for path in paths if not path.name.startswith(".") and not path.name.endswith("~")]
    found = [path for path in found if path.is_file() and os.access(path, os.X_OK)]
    for path in (place, *found) if found else ():
        problem = distrust(path)
        if problem is not None:
            raise PluginError(str(problem.place), f"{problem.reason}: it is not run, and nothing was done")
    return found


@contextlib.contextmanager
def around(
    operation: Operation,
    domain: str,
    plan: Mapping[str, object],
    *,
    uri: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Iterator[list[str]]:
    """Run the block between the executables' `before` and `after`; yield a list to which failures of `after` are added.

    Raises:
        PluginError: an executable failed before; the block was not entered.
        InvalidRequest: the deadline in the environment is not a number.
    """
    paths = executables(environ)
    notes: list[str] = []
    if not paths:
        yield notes
        return
    connection = {"LIBVIRT_DEFAULT_URI": uri} if uri else {}
    call = _Call(operation, domain, plan, {**environ, **connection}, _deadline(environ))
    begun: list[Path] = []
    result: str = "aborted"
    reason: str | None = None
    try:
        for path in paths:
            begun.append(path)
            call.ask(path)
        result = "failed"
        yield notes
        result = "done"
    except BaseException as error:
        reason = str(error) or type(error).__name__
        raise
    finally:
        for path in reversed(begun):
            complaint = call.run(path, "after", result=result, reason=reason)
            if complaint is not None:
                notes.append(f"{path}: {complaint}")


def _deadline(environ: Mapping[str, str]) -> float:
    text = environ.get(DEADLINE_VARIABLE, "")
    try:
        seconds = float(text) if text else DEFAULT_DEADLINE
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InvalidRequest(DEADLINE_VARIABLE, f"{text!r} must be a number of seconds")
    return seconds
