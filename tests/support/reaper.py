"""Run a command as the parent that orphans fall to, and bury them at once: `python tests/support/reaper.py COMMAND...`.

libvirt's QEMU is an orphan from birth, and libvirt counts it as running until its parent has asked how it ended. The
first process of a container or a small machine may do so after seconds only, which every stop of a guest then takes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from typing import Final

_PR_SET_CHILD_SUBREAPER: Final = 36  # linux/prctl.h


def main(words: list[str]) -> int:
    """Return the exit status of the command; 128 and its number more when a signal ended it, as shells have it."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl: no subreaper")
    children: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _frame: object) -> None:
        if number != signal.SIGINT:  # the terminal's own ^C reaches the command without us
            for child in children:
                child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    children.append(subprocess.Popen(words))
    while True:
        pid, status = os.wait()
        if pid == children[0].pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
