"""VMware's snapshot dictionary: `NAME.vmsd`, beside the disks of a virtual machine.

Lines `key = "value"`; keys are the same whatever their case, and `|XX` in a value is the character of that code. What
it says of each snapshot, and which of these are read:

    snapshot0.uid = "1"                      snapshot.current = "2"
    snapshot0.displayName = "before update"  snapshot.numSnapshots = "2"
    snapshot0.description = "..."            snapshot.mru0.uid, .filename (memory), .type: not read
    snapshot0.parent = "0"                   a uid; absent, or of no snapshot: it has none
    snapshot0.createTimeHigh/Low = "..."     two signed 32-bit halves of the microseconds since 1970
    snapshot0.disk0.fileName = "d.vmdk"      the frozen file
    snapshot0.disk0.node = "scsi0:0"

Source: the format has no specification; this is what Workstation 4 to 17 and ESXi write, read by many tools alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qemu_vmdk_snap.errors import FormatError

MAX_BYTES: Final = 4 << 20
MAX_SNAPSHOTS: Final = 4096
_LINE: Final = re.compile(r'^\s*([^\s=#]+)\s*=\s*"(.*)"\s*$')
_ESCAPE: Final = re.compile(r"\|([0-9A-Fa-f]{2})")
_ENCODINGS: Final = {"utf-8": "utf-8", "windows-1252": "cp1252", "shift_jis": "shift_jis", "gbk": "gbk"}


@dataclass(frozen=True, slots=True)
class VmsdSnapshot:
    """One snapshot, as VMware knows it."""

    uid: str
    name: str
    description: str | None
    creation_time: int | None
    """Seconds since 1970."""
    parent: str | None
    """A uid of another snapshot in the file."""
    files: tuple[Path, ...]
    """The frozen files of its disks; not checked, and possibly elsewhere or gone."""


@dataclass(frozen=True, slots=True)
class Vmsd:
    """The content of a dictionary; parents come before their children."""

    path: Path
    snapshots: tuple[VmsdSnapshot, ...]
    current: str | None
    """The uid of the current snapshot."""


def read_vmsd(path: Path) -> Vmsd:
    """Return what the dictionary says.

    Raises:
        FormatError: it is not a dictionary, or snapshots are each other's parents.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise FormatError(path, 0, "size", f"over {MAX_BYTES}", f"must be at most {MAX_BYTES} bytes")
    words = _parse(path, raw)
    numbers = sorted({int(found[1]) for key in words if (found := re.match(r"snapshot(\d{1,6})\.uid$", key))})
    if len(numbers) > MAX_SNAPSHOTS:
        raise FormatError(path, 0, "snapshots", len(numbers), f"must be at most {MAX_SNAPSHOTS}")
    uids = {words[f"snapshot{number}.uid"] for number in numbers}
    snapshots = [_snapshot(path, words, f"snapshot{number}.", uids) for number in numbers]
    current = words.get("snapshot.current")
    return Vmsd(path, _parents_first(path, snapshots), current if current in uids else None)


def _parse(path: Path, raw: bytes) -> dict[str, str]:
    head = re.search(rb'(?im)^\s*\.encoding\s*=\s*"([^"]*)"', raw)
    encoding = _ENCODINGS.get(head[1].decode("ascii", "replace").lower() if head else "", "utf-8")
    words: dict[str, str] = {}
    for line in raw.decode(encoding, "replace").splitlines():
        found = _LINE.match(line)
        if found:
            words[found[1].lower()] = _ESCAPE.sub(lambda match: chr(int(match[1], 16)), found[2])
    if "\0" in raw.decode("latin-1") or not any(key.startswith(("snapshot", ".encoding")) for key in words):
        raise FormatError(path, 0, "dictionary", raw[:16], 'must be lines like snapshot0.uid = "1"')
    return words


def _snapshot(path: Path, words: dict[str, str], key: str, uids: set[str]) -> VmsdSnapshot:
    uid, parent = words[f"{key}uid"], words.get(f"{key}parent")
    files = []
    for number in range(64):
        name = words.get(f"{key}disk{number}.filename")
        if name:
            files.append(path.parent / name.replace("\\", "/"))
    return VmsdSnapshot(
        uid=uid,
        name=words.get(f"{key}displayname") or f"snapshot {uid}",
        description=words.get(f"{key}description") or None,
        creation_time=_seconds(words.get(f"{key}createtimehigh"), words.get(f"{key}createtimelow")),
        parent=parent if parent in uids and parent != uid else None,
        files=tuple(files),
    )


def _seconds(high: str | None, low: str | None) -> int | None:
    try:
        microseconds = (int(high or "") << 32) + (int(low or "") & 0xFFFF_FFFF)
    except ValueError:
        return None
    return microseconds // 1_000_000 if 0 < microseconds < 1 << 62 else None


def _parents_first(path: Path, snapshots: list[VmsdSnapshot]) -> tuple[VmsdSnapshot, ...]:
    ordered: list[VmsdSnapshot] = []
    placed: set[str | None] = {None}
    waiting = snapshots
    while waiting:
        ready = [snapshot for snapshot in waiting if snapshot.parent in placed]
        if not ready:
            raise FormatError(path, 0, "parent", waiting[0].parent, "must not lead back to the snapshot itself")
        ordered += ready
        placed |= {snapshot.uid for snapshot in ready}
        waiting = [snapshot for snapshot in waiting if snapshot.uid not in placed]
    return tuple(ordered)
