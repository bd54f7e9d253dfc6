"""Runs one command and prints its status, its wall time and its peak memory: `python -I -S spawn.py OUTPUT WORD...`.

A process of its own, because the kernel counts what a process had before `exec` into its peak: started straight from
the benchmark, everything would seem to need as much memory as the benchmark itself.
"""

import os
import sys
import time

target = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
started = time.perf_counter()
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, target, 1)])
_, status, usage = os.wait4(pid, 0)
seconds = time.perf_counter() - started
sys.stdout.write(f"{os.waitstatus_to_exitcode(status)} {seconds} {usage.ru_maxrss * 1024}\n")
