"""Errors for programs: the table from error class to exit status, and the error as JSON.

0 to 3 keep the meaning that qemu-img gives them command by command (compare: 0 same, 1 different, 2 error; check: 0
good, 2 corrupt, 3 leaks), so the classes begin above. 63 is qemu-img's own status for "not supported".
"""

from __future__ import annotations

import os

from qemu_vmdk_snap import errors
from qemu_vmdk_snap.light import Final

USAGE: Final = 64
SYSTEM: Final = 74
CANCELLED: Final = 130


class UsageError(Exception):
    """A command line that cannot be parsed."""


BY_CLASS: Final[dict[type[BaseException], int]] = {
    errors.Unsupported: 63,
    errors.InvalidRequest: USAGE,
    errors.FormatError: 65,
    errors.CorruptChain: 66,
    errors.CidMismatch: 67,
    errors.StillNeeded: 68,
    errors.DomainError: 69,
    errors.PluginError: 70,
    errors.GuestError: 71,
    errors.LockBusy: 75,
    OSError: SYSTEM,
    KeyboardInterrupt: CANCELLED,
}


_FIELDS: Final = ("path", "domain", "snapshot", "overlay", "parent", "offset", "field", "subject", "guest", "plugin")
"""The attributes of errors that are in the JSON, under the same names."""


def as_object(error: BaseException, message: str, status: int) -> dict[str, object]:
    """Return the error for programs: `{"error": {"class", "code", "message", ..., "exit-status"}}`.

    `code` never changes its meaning; docs/json.md lists all codes. What the error is about (`path`, `domain`,
    `snapshot`, ...) is included if it is known.
    """
    return {"error": {**_described(error, message), "exit-status": status}}


def as_error(error: Exception) -> dict[str, object]:
    """Return the inner object of `as_object`, for answers that end no process."""
    return _described(error, errors.printable(one_line(error)))


def _described(error: BaseException, message: str) -> dict[str, object]:
    value: dict[str, object] = {"class": type(error).__name__, "code": code_of(error), "message": message}
    for name in _FIELDS:
        about = getattr(error, name, None)
        if about is not None:
            value[name] = about if isinstance(about, int) else str(about)
    if isinstance(error, errors.StillNeeded):
        value["dependents"] = [{"filename": str(file), "reason": reason} for file, reason in error.dependents]
    if isinstance(error, OSError):
        if error.filename is not None:
            value["path"] = os.fsdecode(error.filename)
        if error.errno is not None:
            value["errno"] = error.errno
    return value


def one_line(error: Exception) -> str:
    """Return the error in one line; for a system error, the file and its reason."""
    if isinstance(error, OSError) and error.strerror:
        name = f"{errors.printable(os.fsdecode(error.filename))}: " if error.filename else ""
        return f"{name}{error.strerror}"
    return str(error)


def code_of(error: BaseException) -> str:
    """Return the frozen code of the error."""
    if isinstance(error, errors.VmdkSnapError):
        return error.code
    if isinstance(error, UsageError):
        return "usage"
    return "cancelled" if isinstance(error, KeyboardInterrupt) else "system"


def status_of(error: BaseException) -> int:
    """Return the exit status of the closest class of `error` in the table, or 70 for an unknown one of ours."""
    for cls in type(error).__mro__:
        if cls in BY_CLASS:
            return BY_CLASS[cls]
    return 70
