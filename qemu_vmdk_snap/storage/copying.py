"""Bytes from file to file without passing through Python: shared extents, then the kernel's own copy, then a buffer."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections import deque
from collections.abc import Callable
from typing import Final

from qemu_vmdk_snap.storage.blockfile import BlockFile, Buffer, naming
from qemu_vmdk_snap.units import MIB

_FICLONERANGE: Final = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range)
_CLONE_RANGE: Final = struct.Struct("qQQQ")  # source fd, source offset, length, destination offset
_CLONE_UNIT: Final = 4096
_KERNEL_STEP: Final = 16 * MIB
_BUFFER_STEP: Final = 4 * MIB
_WRITE_BACK_STEP: Final = 16 * MIB
_KEPT_STEPS: Final = 4
_NOT_HERE: Final = (
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.ENOTTY,
    errno.EXDEV,
    errno.ENOSYS,
    errno.EPERM,
    errno.ETXTBSY,
    errno.EBADF,
)


class WriteBehind:
    """Stores large amounts of written data while the copy is running, and drops them from the page cache.

    So the flush at the end is short, guests keep their pages, and the copy reuses the pages that it has used already:
    fresh ones cost the kernel time, in a virtual machine several times that of the copying.
    """

    def __init__(self, file: BlockFile) -> None:
        self._file = file
        self._start = self._end = self._amount = 0
        self._stored: deque[tuple[int, int]] = deque()

    def wrote(self, offset: int, length: int) -> None:
        """Record what was written. Each range is stored while the next one is written, and then dropped."""
        if self._amount:
            self._start, self._end = min(self._start, offset), max(self._end, offset + length)
        else:
            self._start, self._end = offset, offset + length
        self._amount += length
        if self._amount < _WRITE_BACK_STEP:
            return
        self._file.begin_flush(self._start, self._end - self._start)
        self._stored.append((self._start, self._end - self._start))
        self._amount = 0
        if len(self._stored) > _KEPT_STEPS:
            self._file.drop_behind(*self._stored.popleft())


class Copier:
    """Copies ranges into one file, remembering which of the fast ways its file systems have refused."""

    def __init__(self, target: BlockFile) -> None:
        self._target = target
        self._no_clone: set[int] = set()
        self._no_kernel_copy: set[int] = set()
        self._behind = WriteBehind(target)

    def copy(
        self, source: BlockFile, source_offset: int, target_offset: int, length: int, on_step: Callable[[int], None]
    ) -> None:
        """Copy `length` bytes, zeros past the source's end; `on_step` gets the number at least every 64 MiB."""
        with naming(self._target.path):
            self._copy(source, source_offset, target_offset, length, on_step)

    def _copy(
        self, source: BlockFile, source_offset: int, target_offset: int, length: int, on_step: Callable[[int], None]
    ) -> None:
        available = max(0, min(length, source.size() - source_offset))
        done = self._clone(source, source_offset, target_offset, available)
        if done:
            on_step(done)
        done = self._in_kernel(source, source_offset, target_offset, done, available, on_step)
        while done < available:
            data = source.read_at(source_offset + done, min(_BUFFER_STEP, available - done))
            if not data:
                break
            self.write(target_offset + done, data)
            done += len(data)
            on_step(len(data))
        if done < length:
            self.put_zeros(target_offset + done, length - done)
            on_step(length - done)

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data` at `offset`, as a part of what is copied."""
        self._target.write_at(offset, data)
        self._behind.wrote(offset, len(data))

    def put_zeros(self, offset: int, length: int) -> None:
        """Make the range of the target read as zeros: a hole where possible, as a grain may be 1 GiB."""
        end, size = offset + length, self._target.size()
        while (offset := self._target.next_data(offset)) < min(end, size):
            hole = min(end, size, self._target.next_hole(offset))
            while offset < hole:
                step = min(_BUFFER_STEP, hole - offset)
                self._target.write_at(offset, bytes(step))
                offset += step
        if size < end:
            self._target.truncate(end)

    def _clone(self, source: BlockFile, source_offset: int, target_offset: int, length: int) -> int:
        in_fd, out_fd = source.fileno(), self._target.fileno()
        if in_fd is None or out_fd is None or in_fd in self._no_clone:
            return 0
        length -= length % _CLONE_UNIT
        if not length or source_offset % _CLONE_UNIT or target_offset % _CLONE_UNIT:
            return 0
        try:
            fcntl.ioctl(out_fd, _FICLONERANGE, _CLONE_RANGE.pack(in_fd, source_offset, length, target_offset))
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            self._no_clone.add(in_fd)
            return 0
        return length

    def _in_kernel(
        self,
        source: BlockFile,
        source_offset: int,
        target_offset: int,
        done: int,
        length: int,
        on_step: Callable[[int], None],
    ) -> int:
        in_fd, out_fd = source.fileno(), self._target.fileno()
        if in_fd is None or out_fd is None or in_fd in self._no_kernel_copy:
            return done
        while done < length:
            step = min(_KERNEL_STEP, length - done)
            try:
                copied = os.copy_file_range(in_fd, out_fd, step, source_offset + done, target_offset + done)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                self._no_kernel_copy.add(in_fd)
                return done
            if not copied:
                return done
            self._behind.wrote(target_offset + done, copied)
            done += copied
            on_step(copied)
        return done
