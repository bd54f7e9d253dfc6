"""Is this host fit: libvirt, QEMU, tools, hooks, drop-ins, and the folder of the records?"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qemu_vmdk_snap.domain.connect import import_libvirt, libvirt_errors, open_connection
from qemu_vmdk_snap.domain.doctor.check import Check
from qemu_vmdk_snap.domain.dropins import dropin
from qemu_vmdk_snap.domain.hooks import install as hooks
from qemu_vmdk_snap.domain.hooks.owners import without_domain
from qemu_vmdk_snap.domain.journal.pending import all_unfinished
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.errors import InvalidRequest, VmdkSnapError

if TYPE_CHECKING:
    import libvirt

OLDEST_LIBVIRT: Final = (9, 0, 0)
OLDEST_QEMU: Final = (7, 2, 0)

_TOOLS: Final = {
    "qemu-system-x86_64": ("note", "guests of this kind, `guest boot` and `demo`: qemu-system-x86"),
    "qemu-img": ("note", "nothing here, but a second opinion on images: qemu-utils"),
    "virsh": ("note", "nothing here, but the examples and most administrators: libvirt-clients"),
}


def check_host(uri: str | None = None, environ: Mapping[str, str] | None = None) -> Iterator[Check]:
    """Yield the checks of this machine's libvirt, QEMU, tools, hooks and folders."""
    yield from _check_libvirt(uri)
    yield from _check_tools()
    yield check_compression()
    yield from _check_hooks(os.environ if environ is None else environ)


def _check_libvirt(uri: str | None) -> Iterator[Check]:
    try:
        library = import_libvirt()
    except VmdkSnapError as error:
        yield Check("libvirt", "bad", str(error))
        return
    yield _check_version("libvirt library", library.getVersion(), OLDEST_LIBVIRT)
    try:
        import libvirt_qemu  # noqa: F401
    except ImportError:
        yield Check("libvirt_qemu", "bad", "its Python binding is missing: no snapshots of running domains")
    try:
        conn = open_connection(uri)
    except VmdkSnapError as error:
        yield Check("connection", "bad", str(error))
        return
    with libvirt_errors("-", "ask for versions"):
        yield Check("connection", "good", conn.getURI())
        yield _check_version("libvirt daemon", conn.getLibVersion(), OLDEST_LIBVIRT)
        yield _check_version("QEMU", conn.getVersion(), OLDEST_QEMU)
    store = IntentStore.of(conn)
    yield from _check_state(conn, store)


def _check_version(subject: str, number: int, oldest: tuple[int, int, int]) -> Check:
    version = (number // 1_000_000, number // 1000 % 1000, number % 1000)
    text = ".".join(map(str, version))
    if version < oldest:
        return Check(subject, "note", f"{text} is older than {'.'.join(map(str, oldest))}, the oldest that was tried")
    return Check(subject, "good", text)


def _check_state(conn: libvirt.virConnect, store: IntentStore) -> Iterator[Check]:
    folder = next((place for place in (store.folder, *store.folder.parents) if place.exists()), Path("/"))
    if not os.access(folder, os.W_OK | os.X_OK):
        yield Check("state", "bad", f"{store.folder} cannot be written by this user: run it as root")
        return
    try:
        if folder == store.folder:
            store.check_folder()
        yield Check("state", "good", str(store.folder))
        pending = all_unfinished(conn)
    except InvalidRequest as error:
        yield Check("state", "bad", str(error))
        return
    for one in pending:
        if not one.running:
            yield Check("state", "bad", f"{one.record}: domain {one.domain}: {one.line()}")


def _check_tools() -> Iterator[Check]:
    for tool, (verdict, purpose) in _TOOLS.items():
        path = shutil.which(tool)
        if path is None:
            yield Check(tool, "bad" if verdict == "bad" else "note", f"is not installed; needed for {purpose}")
            continue
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=20).stdout
        yield Check(tool, "good", (said.strip().splitlines() or [path])[0])


def check_compression() -> Check:
    """Return the check of what deflates and inflates compressed grains."""
    try:
        import deflate  # noqa: F401
    except ImportError:
        text = "zlib, 2 to 3 times slower than libdeflate for streamOptimized: pip install deflate"
        return Check("compression", "note", text)
    return Check("compression", "good", "libdeflate")


def _check_hooks(environ: Mapping[str, str]) -> Iterator[Check]:
    state = hooks.status()
    if not state.installed:
        yield Check("hook", "note", f"{state.path} {state.problem}")
    elif state.problem:
        yield Check("hook", "bad", f"{state.path} {state.problem}")
    else:
        stale = "" if state.current else ", not what this version would write: install it again"
        yield Check("hook", "good" if state.current else "note", f"{state.path} of version {state.version}{stale}")
    lost = {one.path: one for one in without_domain(state.policies)}
    for policy in (lost.get(one.path, one) for one in state.policies):
        yield Check(f"policy {policy.domain}", "bad" if policy.problem else "good", policy.problem or str(policy.path))
    for daemon in state.restart:
        yield Check("hook", "note", f"{daemon} is older than the hook: restart it, if it was the first in its folder")
    try:
        paths = dropin.executables(environ)
    except VmdkSnapError as error:
        yield Check("drop-ins", "bad", str(error))
    else:
        yield Check("drop-ins", "good", ", ".join(path.name for path in paths) or f"none in {dropin.folder(environ)}")
