"""The parent of a test run passes on how it ended, and buries what falls to it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REAPER = Path(__file__).parents[2] / "support" / "reaper.py"

ORPHAN = """
import os, sys, time

middle = os.fork()
if not middle:
    orphan = os.fork()
    if not orphan:
        time.sleep(0.1)
    else:
        print(orphan, flush=True)
    os._exit(0)
os.waitpid(middle, 0)
sys.stdin.read()
"""


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_the_status_is_the_commands(code: str, status: int) -> None:
    assert subprocess.run([sys.executable, REAPER, sys.executable, "-c", code], check=False).returncode == status


def test_an_orphan_is_buried_at_once() -> None:
    words: list[str | Path] = [sys.executable, REAPER, sys.executable, "-c", ORPHAN]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        orphan = Path("/proc") / process.stdout.readline().strip()
        while orphan.exists():  # its family goes on until standard input ends
            time.sleep(0.01)
        process.stdin.close()
        assert process.wait(60) == 0


def test_a_request_to_end_goes_on_to_the_command() -> None:
    words: list[str | Path] = [
        sys.executable,
        REAPER,
        sys.executable,
        "-c",
        "import time; print('up', flush=True); time.sleep(600)",
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
