"""Logging that costs nothing if it is not used: `logging` is not imported for it.

A module says `_log = log.of(__name__)` and calls `_log.debug` or `_log.info` as it would a logger's. Records reach the
logger of that name, under `qemu_vmdk_snap`, once somebody in the process has imported `logging`. A hook at a guest's
start, which has not imported it, spends no time on it.
"""

from __future__ import annotations

import sys

from qemu_vmdk_snap.light import NamedTuple


class Log(NamedTuple):
    """The logger of one module."""

    name: str

    def info(self, message: str, *args: object) -> None:
        """Log what was changed: a journal record, a file that got its name, a definition that libvirt took."""
        logging = sys.modules.get("logging")
        if logging is not None:
            logging.getLogger(self.name).info(message, *args, stacklevel=2)

    def debug(self, message: str, *args: object) -> None:
        """Log details: a lock, a file that was opened, a command that was sent."""
        logging = sys.modules.get("logging")
        if logging is not None:
            logging.getLogger(self.name).debug(message, *args, stacklevel=2)


def of(name: str) -> Log:
    """Return the logger of the module `name`."""
    return Log(name)
