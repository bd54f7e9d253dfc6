"""Copy what a guest sees on a disk into an image, a raw file or a block device that is there already."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

from qemu_vmdk_snap.chain.change import open_for_change
from qemu_vmdk_snap.chain.disk import Disk
from qemu_vmdk_snap.chain.needs.dependents import (
    Census,
    require_nobody_new,
    require_one_name,
    require_unneeded,
    search_folders,
)
from qemu_vmdk_snap.chain.needs.own import require_own_files
from qemu_vmdk_snap.chain.resolver import Resolver, confined
from qemu_vmdk_snap.errors import InvalidRequest, Unsupported
from qemu_vmdk_snap.ops.copy.convert import DEFAULT_SPARSE, ConvertReport
from qemu_vmdk_snap.ops.copy.limited import Pace
from qemu_vmdk_snap.ops.copy.pipes import rows_with_grains
from qemu_vmdk_snap.ops.copy.transfer import LinkWriter, View
from qemu_vmdk_snap.ops.copy.zeros import may_share, nonzero_parts
from qemu_vmdk_snap.ops.journal.recover import settle
from qemu_vmdk_snap.ops.progress import Meter, OnProgress, ignore
from qemu_vmdk_snap.storage.blockfile import BlockFile, Buffer, PosixFile, open_posix
from qemu_vmdk_snap.storage.copying import Copier
from qemu_vmdk_snap.storage.locks import lock_image
from qemu_vmdk_snap.units import MIB, SECTOR_SIZE, round_up
from qemu_vmdk_snap.vmdk.runs import DATA

_STEP: Final = MIB


class _Target(Protocol):
    """What is written: every range of it once, in ascending order."""

    capacity: int

    def put(self, offset: int, length: int, source: BlockFile, source_offset: int) -> None:
        """Copy `length` bytes of `source` to `offset`."""

    def put_bytes(self, offset: int, data: Buffer) -> None:
        """Write `data` to `offset`."""

    def put_zeros(self, offset: int, length: int) -> None:
        """Make the range read as zeros."""

    def finish(self) -> None:
        """Return when everything is durable."""


def convert_into(
    source: Disk,
    path: Path | str,
    *,
    output_format: str = "vmdk",
    sparse_size: int | None = 0,
    target_is_zero: bool = False,
    allow_devices: bool = False,
    rate_limit: int = 0,
    orphans: Sequence[Path | str] = (),
    trusted_dirs: Sequence[Path | str] = (),
    resolver: Resolver | None = None,
    on_progress: OnProgress = ignore,
) -> ConvertReport:
    """Write what `source` shows a guest over what the image `path` holds, as `qemu-img convert -n` does.

    The image (`output_format` vmdk or raw) must be at least as large; what it has past the end of `source` stays.
    `target_is_zero` takes the caller's word that the image reads as zeros now, so that zeros are not written. A block
    device must be allowed, and be in nobody's use. Ended before its time, the image is half written: it has a new CID.

    Raises:
        InvalidRequest: the image is smaller than `source`, or has an extent that is not its own.
        StillNeeded: something else needs the image, or may need it; `orphans` are given up.
        Unsupported: it is of a kind that takes no writes, or a device that is not allowed.
        LockBusy: another process has it open.
        OSError: there is no such image; it is mounted, or otherwise in use.
    """
    path, find = Path(path), resolver or confined(trusted_dirs)
    given_up = [Path(one) for one in orphans]
    meter = Meter("convert", source.capacity, on_progress)
    with contextlib.ExitStack() as stack:
        if output_format == "raw":
            target: _Target = _raw_target(path, allow_devices, given_up, find, stack)
        else:
            target = _vmdk_target(path, given_up, find, stack, meter.step)
        if target.capacity < source.capacity:
            raise InvalidRequest(path, f"its {target.capacity} bytes cannot take the {source.capacity} of the input")
        stored = _Copy(source, target, sparse_size, path.parent, target_is_zero, rate_limit, meter).run()
        target.finish()
    return ConvertReport(path, source.capacity, stored)


class _Copy:
    """One copy into a target."""

    def __init__(
        self,
        source: Disk,
        target: _Target,
        sparse_size: int | None,
        folder: Path,
        target_is_zero: bool,
        rate_limit: int,
        meter: Meter,
    ) -> None:
        self._source, self._target, self._meter = source, target, meter
        self._unit, self._folder, self._is_zero = sparse_size, folder, target_is_zero
        self._pace = Pace(rate_limit) if rate_limit else None
        self._buffer = bytearray(_STEP)
        self._shares: dict[int, bool] = {}

    def run(self) -> int:
        """Copy all, and return how many bytes were stored that may be others than zeros."""
        stored = 0
        for row, grain in rows_with_grains(self._source):
            file = self._source.file_of(row) if grain is None else None
            if grain is not None:
                stored += self._store(grain, row.offset)
            elif row.kind < DATA:
                self._zeros(row.offset, row.length)
            elif file is not None and self._as_it_is(file):
                self._target.put(row.offset, row.length, file, row.file_offset)
                self._passed(row.length)
                stored += row.length
            else:
                for skip in range(0, row.length, _STEP):
                    view = memoryview(self._buffer)[: min(_STEP, row.length - skip)]
                    self._source.read_row_into(row, skip, view)
                    stored += self._store(view, row.offset + skip)
            self._meter.reach(row.offset + row.length)
        return stored

    def _as_it_is(self, file: BlockFile) -> bool:
        if self._unit is not None or self._pace is not None:
            return self._unit == 0 and self._pace is None
        if id(file) not in self._shares:
            self._shares[id(file)] = may_share(file, self._folder)
        return self._shares[id(file)]

    def _store(self, data: Buffer, offset: int) -> int:
        view, done, stored = memoryview(data), 0, 0
        unit = DEFAULT_SPARSE if self._unit is None else self._unit
        for start, end in nonzero_parts(data, offset, unit):
            self._zeros(offset + done, start - done)
            self._target.put_bytes(offset + start, view[start:end])
            self._passed(end - start)
            stored += end - start
            done = end
        self._zeros(offset + done, len(view) - done)
        return stored

    def _zeros(self, offset: int, length: int) -> None:
        if length and not self._is_zero:
            self._target.put_zeros(offset, length)

    def _passed(self, length: int) -> None:
        if self._pace is not None:
            self._pace.passed(length)


class _RawTarget:
    """A raw file or a block device."""

    def __init__(self, file: PosixFile) -> None:
        self.capacity = round_up(file.size(), SECTOR_SIZE)
        self._file, self._copier = file, Copier(file)

    def put(self, offset: int, length: int, source: BlockFile, source_offset: int) -> None:
        """Copy `length` bytes of `source` to `offset`."""
        self._copier.copy(source, source_offset, offset, length, lambda _: None)

    def put_bytes(self, offset: int, data: Buffer) -> None:
        """Write `data` to `offset`."""
        self._copier.write(offset, data)

    def put_zeros(self, offset: int, length: int) -> None:
        """Make the range a hole, or write zeros where there are no holes."""
        length = min(length, self._file.size() - offset)
        if length > 0 and not self._file.discard_range(offset, length):
            self._copier.put_zeros(offset, length)

    def finish(self) -> None:
        """Return when everything is durable."""
        self._file.flush()


def _raw_target(
    path: Path, allow_devices: bool, orphans: list[Path], resolver: Resolver, stack: contextlib.ExitStack
) -> _RawTarget:
    device = path.is_block_device()
    if device and not allow_devices:
        raise Unsupported(path, "is a block device: written only where that is allowed (--allow-devices)")
    if not device:
        census = Census.of(search_folders([path], resolver))
        require_unneeded(path, [path], census, orphans=orphans)
        require_one_name(path, [path], census, orphans=orphans)
    # O_EXCL of a device: refused by the kernel where it is mounted, or a part of a volume group, an array, ...
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_EXCL if device else 0))
    stack.callback(os.close, fd)
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISBLK(mode) if device else stat.S_ISREG(mode)):
        raise OSError(errno.EINVAL, "neither a regular file nor a block device", str(path))
    lock_image(fd, path, writable=True)
    return _RawTarget(PosixFile(fd, path))


class _VmdkTarget:
    """The top link of a chain that is open for a change."""

    def __init__(self, writer: LinkWriter, capacity: int) -> None:
        self.capacity = capacity
        self.put, self.put_bytes, self.put_zeros = writer.put, writer.put_bytes, writer.put_zeros
        self.finish = writer.finish


def _vmdk_target(
    path: Path, orphans: list[Path], resolver: Resolver, stack: contextlib.ExitStack, on_step: Callable[[int], None]
) -> _VmdkTarget:
    path = path.resolve() if path.is_symlink() else path
    settle(path.parent, opener=open_posix, resolver=resolver)
    chain = stack.enter_context(open_for_change(path, depths=[0], resolver=resolver))
    link = chain.links[0]
    require_own_files(link)
    files = [file.path for file in link.files]
    census = Census.of(search_folders(files, resolver))
    require_unneeded(path, files, census, orphans=orphans)
    require_one_name(path, files, census, orphans=orphans)
    link.renew_cid()  # barrier: whoever has made an overlay a moment ago finds that its base has changed
    require_nobody_new(path, files, census)
    return _VmdkTarget(LinkWriter(link, View(chain, 1), on_step), link.capacity)
