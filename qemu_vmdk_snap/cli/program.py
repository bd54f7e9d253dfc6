"""The program: `main` in a process of its own, which begins and ends without what a short command has no use for."""

from __future__ import annotations

import gc
import os
import signal
import sys

_OBJECTS_BETWEEN_COLLECTIONS = 50_000


def program() -> int:
    """Run the command line and end the process, or return its exit status where the interpreter is to end it."""
    if sys.argv[1:2] != ["serve"]:  # a server runs for months: it is collected as usual
        # What modules are made of stays: looking through it again and again takes as long as a tenth of the start.
        gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS, *gc.get_threshold()[1:])
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        # It asks for the progress, and would end a command that has not got as far as having any.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    from qemu_vmdk_snap.cli.main import main

    status = main()
    _leave(status)
    return status


def _leave(status: int) -> None:
    """End the process at once: taking the interpreter apart takes as long as the work of a short command.

    What was registered for the end is done first. With other threads, and in development mode, which reports what was
    left open, the interpreter ends as usual.
    """
    threading = sys.modules.get("threading")
    if sys.flags.dev_mode or (threading is not None and threading.active_count() > 1):
        return
    if "atexit" in sys.modules:
        sys.modules["atexit"]._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return  # the interpreter says what is to be said of it
    os._exit(status)
