"""TCG or KVM: KVM only where a boot has shown it to be faster.

`/dev/kvm` alone proves little: in some virtual machines it exists and is ten times slower than TCG, or does not work.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final

from qemu_vmdk_snap.errors import PluginError
from qemu_vmdk_snap.harness.deadlines import HUNG_SECONDS
from qemu_vmdk_snap.harness.hardware import EXECUTABLE
from qemu_vmdk_snap.harness.probe import floppy_image

_KVM: Final = Path("/dev/kvm")
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_FIRST_LINE: Final = b"00 ok probe"
_TCG_LIMIT: Final = 20.0
_KVM_TIMES: Final = 10.0


def choose_accelerator() -> str:
    """Return `kvm` where it boots the probe faster than TCG does, else `tcg`; measured once a boot of the host."""
    if not os.access(_KVM, os.R_OK | os.W_OK):
        return "tcg"
    if (known := _known().get("accelerator")) in ("tcg", "kvm"):
        return str(known)
    tcg = boot_seconds("tcg", _TCG_LIMIT)
    # KVM is given no longer than TCG took: then it is known not to be faster.
    kvm = boot_seconds("kvm", tcg) if tcg is not None else None
    verdict = "kvm" if kvm is not None else "tcg"
    _remember(accelerator=verdict, tcg=tcg, kvm=kvm)
    return verdict


def kvm_fault() -> str | None:
    """Return why KVM is of no use to guests here, or None: measured once a boot of the host.

    It may well be slower than TCG, but not so slow that a guest that is well seems to hang.
    """
    if not os.access(_KVM, os.R_OK | os.W_OK):
        return "/dev/kvm cannot be used here"
    if shutil.which(EXECUTABLE) is None:
        return None  # that is another fault
    known = _known()
    in_time = known.get("kvm-in-time", known.get("kvm") is not None or None)
    if in_time is None:
        # TCG at the same time, so that the same load is in both.
        tcg = boot_seconds("tcg", _TCG_LIMIT)
        limit = _TCG_LIMIT if tcg is None else max(HUNG_SECONDS, _KVM_TIMES * tcg)
        in_time = boot_seconds("kvm", limit) is not None
        _remember(**{"kvm-in-time": in_time})
    return None if in_time else "/dev/kvm is there, but KVM boots no guest in time on this machine"


def _known() -> dict[str, object]:
    """Return what was measured since the host was started."""
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(record.read_text()) if (record := _cache_file()) is not None else None
        if isinstance(known, dict) and known.get("boot_id") == _boot_id():
            return known
    return {}


def _remember(**measured: object) -> None:
    record = _cache_file()
    if record is not None:
        with contextlib.suppress(OSError):  # without a cache it is measured again
            record.write_text(json.dumps({**_known(), "boot_id": _boot_id(), **measured}))


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def boot_seconds(accelerator: str, limit: float) -> float | None:
    """Return the seconds from starting QEMU to the probe's first line, or None when that takes over `limit`."""
    ours, theirs = socket.socketpair()
    with tempfile.NamedTemporaryFile(prefix="qemu-vmdk-snap-probe-", suffix=".img") as floppy, ours:
        floppy.write(floppy_image())
        floppy.flush()
        words = [EXECUTABLE, "-nodefaults", "-no-user-config", "-display", "none", "-m", "16"]
        words += ["-machine", "pc", "-accel", accelerator, "-boot", "order=a"]
        words += ["-chardev", f"socket,id=line,fd={theirs.fileno()}", "-serial", "chardev:line"]
        words += ["-drive", f"if=floppy,format=raw,readonly=on,file={floppy.name}"]
        started = time.monotonic()
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        except OSError:
            return None
        finally:
            theirs.close()
        try:
            return _first_line_at(ours, started, limit)
        finally:
            process.kill()
            process.wait()


def _first_line_at(line: socket.socket, started: float, limit: float) -> float | None:
    seen = b""
    while (left := started + limit - time.monotonic()) > 0:
        line.settimeout(left)
        try:
            data = line.recv(256)
        except TimeoutError:
            return None
        seen += data
        if _FIRST_LINE in seen:
            return time.monotonic() - started
        if not data:
            return None
    return None


def _cache_file() -> Path | None:
    """Return where the measurement is kept, or None for a user who has no place for it."""
    try:
        return cache_folder() / "accelerator.json"
    except PluginError:
        return None


def cache_folder() -> Path:
    """Return the folder for what can be made again, which exists and can be written.

    It is in XDG_CACHE_HOME or `~/.cache`. For a user without a home, or with one that cannot be written, it is a folder
    of the user's own among the temporary files.

    Raises:
        PluginError: that folder is another user's, or open to others.
    """
    with contextlib.suppress(OSError, RuntimeError):  # the latter: there is no such user
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qemu-vmdk-snap"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    return _private_folder(Path(tempfile.gettempdir(), f"qemu-vmdk-snap-{os.geteuid()}"))


def _private_folder(folder: Path) -> Path:
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except OSError as error:
        raise PluginError("cache", f"{folder}: {error.strerror}: set XDG_CACHE_HOME") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PluginError("cache", f"{folder} is not a folder of this user's own: set XDG_CACHE_HOME")
    return folder
