"""Undo files: what a repair replaces, durable before the first change, and how it is restored.

    | one line of JSON: version, files | (byte, length) of each range, u64 | bytes of the ranges | SHA-256 of all that |

For each file the line says its name as seen from the undo file's folder, its inode and whether it is on the folder's
device, its length before and after the repair, the CID that the repair left, and how many ranges are its own.

An undo file makes a later command, perhaps root's, write to images. So it is checked whole before the first write: its
owner, its checksum, every name, and that no image was written since.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from qemu_vmdk_snap.chain.resolver import Confined, check_opened
from qemu_vmdk_snap.errors import CorruptChain, VmdkSnapError
from qemu_vmdk_snap.light import dataclass
from qemu_vmdk_snap.ops.check.opening import descriptor_of, open_file_for_change
from qemu_vmdk_snap.ops.check.repair_plan import ExtentPlan
from qemu_vmdk_snap.storage.blockfile import BlockFile, FileOpener
from qemu_vmdk_snap.storage.durable import new_file
from qemu_vmdk_snap.units import MIB
from qemu_vmdk_snap.vmdk.cowd.header import COWD_MAGIC
from qemu_vmdk_snap.vmdk.descriptor import HEAD_BYTES, is_descriptor
from qemu_vmdk_snap.vmdk.sparse.header import MAGIC

VERSION: Final = 2
_STEP: Final = 4 * MIB
_MAX_HEAD: Final = 4 * MIB
_MAX_FILES: Final = 1 << 14
_MAX_LENGTH: Final = 1 << 50
_MAX_NAME: Final = 4096
_CID: Final = re.compile("[0-9a-f]{8}")
_RANGE: Final = struct.Struct("<QQ")
_RANGES_AT_ONCE: Final = 1 << 14
_SHOWN: Final = 100
"""How many characters of a damaged file go into a message."""
_DIGEST: Final = hashlib.sha256().digest_size


class UndoneFile(NamedTuple):
    """One file of an undo file."""

    name: str
    """As seen from the undo file's folder."""
    inode: int | None
    same_device: bool
    """Whether it is on the device of the undo file's folder: device numbers change when a machine is restarted."""
    size: int
    """Its length before the repair, bytes."""
    size_after: int
    cid: str | None
    """The CID that the repair left; None for an extent, which has none."""
    ranges: int


def write_undo(path: Path, plans: Sequence[ExtentPlan]) -> None:
    """Write a new undo file `path` with everything that `plans` replace, durably.

    Raises:
        FileExistsError: it exists.
    """
    folder = path.parent.resolve()
    kept = [(plan.file, _kept_ranges(plan)) for plan in plans]
    files = [_described(plan, len(ranges), folder)._asdict() for plan, (_, ranges) in zip(plans, kept, strict=True)]
    head = json.dumps({"version": VERSION, "files": files}).encode() + b"\n"
    table = b"".join(_RANGE.pack(*one) for _, ranges in kept for one in ranges)
    with new_file(path, mode=0o600) as target:
        digest = hashlib.sha256(head + table)
        target.write_at(0, head + table)
        position = len(head) + len(table)
        for file, ranges in kept:
            for at, length in ranges:
                for skip in range(0, length, _STEP):
                    data = file.read_at(at + skip, min(_STEP, length - skip))
                    digest.update(data)
                    target.write_at(position, data)
                    position += len(data)
        target.write_at(position, digest.digest())


def _kept_ranges(plan: ExtentPlan) -> list[tuple[int, int]]:
    size = plan.file.size()
    ranges = [(at, len(data)) for at, data in plan.patches] + plan.kept
    if plan.header is not None:
        ranges.append((0, len(plan.header)))
    return [(at, min(length, size - at)) for at, length in ranges if at < size and length]


def _described(plan: ExtentPlan, ranges: int, folder: Path) -> UndoneFile:
    file = plan.file
    name = os.path.relpath(file.path.resolve(), folder)
    inode, device = _identity(file)
    same_device = device is None or device == folder.stat().st_dev
    return UndoneFile(name, inode, same_device, file.size(), plan.end, cid_of(file), ranges)


def _identity(file: BlockFile) -> tuple[int | None, int | None]:
    """Return inode and device of an open file; None for one that is not a file of the system."""
    descriptor = file.fileno()
    if descriptor is None:
        return None, None
    facts = os.fstat(descriptor)
    return facts.st_ino, facts.st_dev


def cid_of(file: BlockFile) -> str | None:
    """Return the CID of an image; None for an extent, whose descriptor is elsewhere."""
    with contextlib.suppress(VmdkSnapError):
        return f"{descriptor_of(file).cid:08x}"
    return None


@dataclass(slots=True)
class UndoFile:
    """An undo file that was checked completely."""

    path: Path
    files: tuple[UndoneFile, ...]
    _fd: int
    _ranges_at: int
    """Byte where the ranges begin."""

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator[Self]:
        """Open and check an undo file; nothing else is opened.

        Raises:
            CorruptChain: it is not an undo file, is damaged, or may have been written by another user.
            OSError: it cannot be read.
        """
        fd = _open(path)
        try:
            _check_owner(fd, path)
            files, ranges_at = _read_head(fd, path)
            undo = cls(path, files, fd, ranges_at)
            undo._check()
            yield undo
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def opened(self, opener: FileOpener, trusted_dirs: Sequence[Path | str]) -> Iterator[list[BlockFile]]:
        """Open and lock every image that it names, in order; nothing is written.

        Raises:
            CorruptChain: a name leads outside the folder and `trusted_dirs`, or to what was not repaired.
            LockBusy: another process has one of the images open.
        """
        resolver = Confined(trusted_dirs)
        with contextlib.ExitStack() as stack:
            found = []
            for one in self.files:
                path = self.path.parent / one.name
                try:
                    real = path.resolve()
                except RuntimeError as error:
                    raise CorruptChain(self.path, f"its image {one.name!r} is a loop of symbolic links") from error
                resolver.check(self.path, real, "image")
                file = open_file_for_change(path, opener)
                stack.callback(file.close)
                check_opened(resolver, self.path, file, "image")
                self._check_same(one, file)
                found.append(file)
            yield found

    def check_unwritten(self, files: Sequence[BlockFile]) -> None:
        """Require that the images are as the repair left them.

        Raises:
            CorruptChain: one was written since, or the repair was undone already.
        """
        for one, file in zip(self.files, files, strict=True):
            if file.size() != one.size_after:
                reason = f"has {file.size()} bytes, not the {one.size_after} that the repair left: written since"
                raise CorruptChain(file.path, f"{reason}, {self.path} cannot be undone")
            if (cid := cid_of(file)) != one.cid:
                raise self._written(file, cid, one)

    def check_cids(self, files: Sequence[BlockFile]) -> None:
        """Require that no image was written since a repair, or undoing it, was interrupted: neither changes a CID.

        Raises:
            CorruptChain: one was.
        """
        for one, file in zip(self.files, files, strict=True):
            if (cid := cid_of(file)) not in (one.cid, None):  # a descriptor torn by a power cut has none
                raise self._written(file, cid, one)

    def _written(self, file: BlockFile, cid: str | None, one: UndoneFile) -> CorruptChain:
        reason = f"has the CID {cid}, not the {one.cid} that the repair left: written since"
        return CorruptChain(file.path, f"{reason}, {self.path} cannot be undone")

    def restore(self, files: Sequence[BlockFile]) -> None:
        """Restore everything, durably. If it is killed at any point, it can be repeated."""
        data = self._ranges_at + _RANGE.size * sum(one.ranges for one in self.files)
        ranges = self._ranges()
        for one, file in zip(self.files, files, strict=True):
            for _ in range(one.ranges):
                at, length = next(ranges)
                for skip in range(0, length, _STEP):
                    file.write_at(at + skip, self._read(data, min(_STEP, length - skip)))
                    data += min(_STEP, length - skip)
            file.truncate(one.size)
            file.flush()

    def _check(self) -> None:
        """Check the ranges, the length and the checksum."""
        size, ranges = os.fstat(self._fd).st_size, self._ranges()
        end = self._ranges_at + _RANGE.size * sum(one.ranges for one in self.files)
        if end + _DIGEST > size:
            raise self._damaged("it was cut short")
        for one in self.files:
            for _ in range(one.ranges):
                at, length = next(ranges)
                if not 0 < length <= one.size or at > one.size - length:
                    raise self._damaged(f"{length} bytes at {at} are not inside the {one.size} of {one.name!r}")
                end += length
        if end + _DIGEST != size:
            raise self._damaged(f"it has {size} bytes, not the {end + _DIGEST} that it records")
        digest = hashlib.sha256()
        for at in range(0, end, _STEP):
            digest.update(self._read(at, min(_STEP, end - at)))
        if digest.digest() != self._read(end, _DIGEST):
            raise self._damaged("its checksum does not fit")

    def _ranges(self) -> Iterator[tuple[int, int]]:
        count = sum(one.ranges for one in self.files)
        for first in range(0, count, _RANGES_AT_ONCE):
            now = min(_RANGES_AT_ONCE, count - first)
            yield from _RANGE.iter_unpack(self._read(self._ranges_at + first * _RANGE.size, now * _RANGE.size))

    def _read(self, offset: int, length: int) -> bytes:
        parts = []
        while length and (data := os.pread(self._fd, length, offset)):
            parts.append(data)
            offset, length = offset + len(data), length - len(data)
        if length:
            raise self._damaged("it was cut short")
        return b"".join(parts)

    def _damaged(self, what: str) -> CorruptChain:
        return CorruptChain(self.path, f"the undo file is damaged: {what}")

    def _check_same(self, one: UndoneFile, file: BlockFile) -> None:
        inode, device = _identity(file)
        same_device = device == self.path.parent.stat().st_dev
        if inode is not None and (one.inode, one.same_device) != (inode, same_device):
            reason = f"is not the file that was repaired (inode {inode}, not {one.inode})"
            raise CorruptChain(file.path, f"{reason}: {self.path} is not written to it")
        head = file.read_at(0, HEAD_BYTES)
        if head[:4] not in (MAGIC, COWD_MAGIC) and not is_descriptor(head):
            raise CorruptChain(file.path, f"is not a VMDK image: {self.path} is not written to it")


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CorruptChain(path, "the undo file is a symbolic link: not followed") from error
        raise


def _check_owner(fd: int, path: Path) -> None:
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode):
        raise CorruptChain(path, "is not an undo file: it is not a regular file")
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        raise CorruptChain(path, "the undo file is another user's, or may be written by others: not followed")


def _read_head(fd: int, path: Path) -> tuple[tuple[UndoneFile, ...], int]:
    """Return the files, and the byte after the head."""
    line, newline, _ = os.pread(fd, _MAX_HEAD, 0).partition(b"\n")
    if not newline:
        raise CorruptChain(path, "is not an undo file: it does not begin with a line of JSON")
    try:
        files = _parse_head(line)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:_SHOWN]!a}"
        raise CorruptChain(path, f"is not an undo file: {reason}") from error
    return files, len(line) + 1


def _parse_head(line: bytes) -> tuple[UndoneFile, ...]:
    """Return the files; raises ValueError, KeyError, TypeError or RecursionError for anything else."""
    record = json.loads(line)
    if record["version"] != VERSION:
        raise ValueError(f"version {record['version']!r} is not {VERSION}")
    if not isinstance(record["files"], list) or not 0 < len(record["files"]) <= _MAX_FILES:
        raise ValueError("not a list of files, or too many of them")
    return tuple(_undone(one) for one in record["files"])


def _undone(one: dict[str, Any]) -> UndoneFile:
    """Return the file of a record; raises ValueError, KeyError or TypeError if it is invalid."""
    found = UndoneFile(**one)
    if not isinstance(found.name, str) or not 0 < len(found.name) <= _MAX_NAME:
        raise TypeError("a name that is empty or too long")
    if "\0" in found.name or Path(found.name).is_absolute():
        raise ValueError(f"name {found.name!r:.{_SHOWN}}")
    found.name.encode("utf-8", "surrogateescape")
    numbers = found.size, found.size_after, found.ranges, 0 if found.inode is None else found.inode
    if not all(type(number) is int and 0 <= number < 1 << 64 for number in numbers):
        raise ValueError("a number out of range")
    if max(found.size, found.size_after, found.ranges) > _MAX_LENGTH:
        raise ValueError("a length out of range")
    if type(found.same_device) is not bool:
        raise TypeError("same_device is neither true nor false")
    if found.cid is not None and not _CID.fullmatch(found.cid):
        raise ValueError("a CID of other than 8 hexadecimal digits")
    return found
