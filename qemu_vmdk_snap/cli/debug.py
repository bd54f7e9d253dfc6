"""`--debug` and QEMU_VMDK_SNAP_LOG: where the log goes. Imported only if one of them is used."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from typing import NamedTuple

from qemu_vmdk_snap import __version__
from qemu_vmdk_snap.errors import printable

_log = logging.getLogger(__name__)
VARIABLE = "QEMU_VMDK_SNAP_LOG"


class _OneLine(logging.Formatter):
    """Names come from untrusted files: a message stays one line."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class Started(NamedTuple):
    """What `start` has changed."""

    handlers: list[logging.Handler]
    level: int
    """The level before."""


def start(*, stderr: bool, file: str | None) -> Started:
    """Send the package's log to standard error, or append it to a file, or both; return the argument for `stop`.

    Raises:
        OSError: the file cannot be opened.
    """
    handlers: list[logging.Handler] = []
    if file:
        handlers.append(logging.FileHandler(file, encoding="utf-8", errors="backslashreplace"))
        handlers[-1].setFormatter(_OneLine(f"%(asctime)s [{os.getpid()}] %(levelname)s %(name)s: %(message)s"))
    if stderr:
        handlers.append(logging.StreamHandler(sys.stderr))
        handlers[-1].setFormatter(_OneLine("qemu-vmdk-snap: debug: %(name)s: %(message)s"))
    logger = logging.getLogger("qemu_vmdk_snap")
    started = Started(handlers, logger.level)
    logger.setLevel(logging.DEBUG)
    for handler in handlers:
        logger.addHandler(handler)
    return started


def stop(started: Started) -> None:
    """Undo `start`."""
    logger = logging.getLogger("qemu_vmdk_snap")
    logger.setLevel(started.level)
    for handler in started.handlers:
        logger.removeHandler(handler)
        handler.close()


def command(prog: str, words: Sequence[str]) -> None:
    """Log the command line."""
    _log.info("%s, version %s", shlex.join([*prog.split(), *words]), __version__)


def ended(status: int) -> None:
    """Log how the command ended."""
    _log.info("exit status %d", status)
