"""The servers of a domain's disks: started, looked at, stopped. Nothing here calls libvirt: a hook may use all of it.

Each start makes one keeper (`keeper`), a process that outlives the caller, starts the servers, and starts one again
that dies. It says on its standard output what became of the start, and nothing after that.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain.served import place
from qemu_vmdk_snap.domain.served.control import Control, NoServer, status_of
from qemu_vmdk_snap.domain.xml import Disk
from qemu_vmdk_snap.domain.xml.served import ServedDisk, behind, owner_of, served_disks
from qemu_vmdk_snap.errors import DomainError

_log = logging.getLogger(__name__)
READY: Final = b"ready\n"
_POLL: Final = 0.02
_STOPPING: Final = 30.0
"""Seconds that a server may take to write everything out."""

_LEAVING: Final = 15.0
"""Seconds in which QEMU, which has ended, is seen to have closed its connection."""


def words_of(domain_xml: str, target: str) -> list[str]:
    """Return the command line that serves the disk as the domain's XML has it now.

    Raises:
        DomainError: the XML has no such served disk.
    """
    disk, there = behind(domain_xml).get(target), served_disks(domain_xml).get(target)
    if disk is None or there is None or disk.path is None:
        raise DomainError("XML", f"has no served disk {target} with a file")
    owner = owner_of(domain_xml)
    words = ["serve", str(disk.path), "--socket", str(there.socket), "--control", str(there.control)]
    for folder in sorted({path.parent for path in disk.backing} - {disk.path.parent}):
        words += ["--allow-dir", str(folder)]
    return [*words, *(["--socket-owner", owner, "--socket-mode", "0600"] if owner else [])]


def program(words: Sequence[str]) -> list[str]:
    """Return what runs this very package with the words, whatever the folder and the environment."""
    root = str(Path(engine.__file__).resolve().parents[1])
    code = f"import sys; sys.path.append({root!r}); from qemu_vmdk_snap.cli.program import program; sys.exit(program())"
    return [sys.executable, "-I", "-c", code, *words]


def start(
    name: str, domain_xml: str, uri: str, targets: Iterable[str] | None = None, *, again: bool = False
) -> list[str]:
    """Start the servers of these disks (of all) that do not answer; return their targets once all are ready.

    `again`: their guest runs, so what the servers have noted of their tops counts before the XML.

    Raises:
        DomainError: one cannot serve its disk, or serves another file than the XML names and has a client. None that
            was started here is left.
    """
    there, files = served_disks(domain_xml), behind(domain_xml)
    wanted = [target for target in there if targets is None or target in targets]
    missing = [target for target in wanted if not _serves(name, there[target], files[target])]
    if missing:
        for target in missing:
            place.make_folder(there[target])
            if not again:
                place.note_of(there[target]).unlink(missing_ok=True)
        _launch(name, {target: (there[target], words_of(domain_xml, target)) for target in missing}, uri)
        _log.info("domain %s: serving %s", name, ", ".join(missing))
    return missing


def stop(name: str, domain_xml: str, *, idle_only: bool = True, leaving: float = _LEAVING) -> list[str]:
    """Stop the servers of the domain's disks, and wait until they have ended; return the targets that were served.

    One that has a client after `leaving` seconds goes on, unless not `idle_only`.

    Raises:
        DomainError: one does not end.
    """
    stopped = []
    for target, disk in served_disks(domain_xml).items():
        deadline = time.monotonic() + leaving
        status = status_of(name, disk.control)
        while idle_only and status is not None and status.get("connections") and time.monotonic() < deadline:
            time.sleep(_POLL)
            status = status_of(name, disk.control)
        if status is not None and not (idle_only and status.get("connections")):
            _stop(name, disk, int(status.get("pid", 0)))
            stopped.append(target)
    return stopped


def statuses(name: str, domain_xml: str) -> dict[str, dict[str, Any] | None]:
    """Return what each server says, by target; None where none answers."""
    return {target: status_of(name, disk.control) for target, disk in served_disks(domain_xml).items()}


def _serves(name: str, disk: ServedDisk, file: Disk) -> bool:
    """Return whether the disk is served; an idle server of another file is stopped."""
    status = status_of(name, disk.control)
    if status is None:
        return False
    top = str(status.get("top", ""))
    if file.path is not None and os.path.realpath(top) == os.path.realpath(file.path):
        return True
    if status.get("connections"):
        reason = f"disk {disk.target}: the server at {disk.control} serves {top}, and the XML names {file.path}"
        raise DomainError(name, f"{reason}: shut the guest down first")
    _stop(name, disk, int(status.get("pid", 0)))
    return False


def _stop(name: str, disk: ServedDisk, pid: int) -> None:
    try:
        with Control(name, disk.control) as control:
            control.ask("stop")
    except NoServer:
        _log.debug("domain %s: the server of %s has ended already", name, disk.target)
    deadline = time.monotonic() + _STOPPING
    while _runs(pid):
        if time.monotonic() > deadline:
            raise DomainError(name, f"disk {disk.target}: its server (process {pid}) does not end")
        time.sleep(_POLL)
    _log.info("domain %s: disk %s is served no more", name, disk.target)


def _runs(pid: int) -> bool:
    """Return whether the process is there, and not only waits to be buried."""
    try:
        return pid > 0 and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _launch(name: str, disks: Mapping[str, tuple[ServedDisk, Sequence[str]]], uri: str) -> None:
    task = {
        "domain": name,
        "uri": uri,
        "disks": {
            target: {"words": program(words), "log": str(place.log_of(disk)), "control": str(disk.control)}
            for target, (disk, words) in disks.items()
        },
    }
    root = str(Path(engine.__file__).resolve().parents[1])
    code = f"import sys; sys.path.append({root!r}); from qemu_vmdk_snap.domain.served.keeper import main; main()"
    # The environment is the hook's, or the user's: records and sockets are found by it.
    keeper = subprocess.Popen(
        [sys.executable, "-I", "-c", code, json.dumps(task)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )
    with keeper:  # it forks and ends at once; what it has become says the rest
        assert keeper.stdout is not None
        said = keeper.stdout.read()
    if said != READY:
        reason = " ".join(said.decode(errors="replace").split()) or "the keeper of its servers has ended"
        raise DomainError(name, f"its disks cannot be served: {reason}")
