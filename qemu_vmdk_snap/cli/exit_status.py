"""The one table from error class to exit status.

0 to 3 keep the meaning that qemu-img gives them command by command (compare: 0 same, 1 different, 2 error; check: 0
good, 2 corrupt, 3 leaks), so the classes begin above. 63 is qemu-img's own status for "not supported".
"""

from __future__ import annotations

from typing import Final

from qemu_vmdk_snap import errors

USAGE: Final = 64
SYSTEM: Final = 74
CANCELLED: Final = 130

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


def status_of(error: BaseException) -> int:
    """Return the exit status of the closest class of `error` in the table, or 70 for an unknown one of ours."""
    for cls in type(error).__mro__:
        if cls in BY_CLASS:
            return BY_CLASS[cls]
    return 70
