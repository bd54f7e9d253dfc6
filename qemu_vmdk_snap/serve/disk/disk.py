"""One export: the disk as its clients read and write it, by places; the chain's own code does what is rare.

All methods are called with the turn of the stack. What is written is in the files, or in the log, when they return.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from typing import ClassVar, Final

from qemu_vmdk_snap import Link, WritableChain
from qemu_vmdk_snap.serve.disk.places import (
    MIXED,
    OFFSET_MASK,
    SLOT_SHIFT,
    WINDOW_SHIFT,
    WINDOW_UNITS,
    ZERO,
    Places,
    unit_of,
)
from qemu_vmdk_snap.serve.disk.stack import MOST_NOTED, Stack
from qemu_vmdk_snap.storage.blockfile import naming
from qemu_vmdk_snap.units import MIB, sector_bytes
from qemu_vmdk_snap.vmdk.extent import PlacedExtent
from qemu_vmdk_snap.vmdk.grain.extent import GTE_ZEROED, GrainExtent

_LAST: Final = WINDOW_UNITS - 1
_ZEROS: Final = memoryview(bytes(MIB))
_OPENING: Final = threading.Lock()


class Disk:
    """What is seen from the top of a stack (`link` is None), or from one of its links downwards, read-only."""

    _open: ClassVar[list[Disk]] = []

    def __init__(self, stack: Stack, link: Link | None = None) -> None:
        self._users = 0
        self.stack = stack
        self.link = link
        self.read_only = stack.read_only or link is not None
        self.places = Places(stack, link)
        self.capacity = self.places.capacity
        self.gone = False
        """Whether the link is no longer one of the chain."""
        self._lean: PlacedExtent | None = None
        """The one extent of the top, where its grains are the units of the places."""
        self._top_slot = 0
        self._grain = memoryview(b"")
        """Room for one grain that is filled up from below."""
        self._changed(True)
        stack.on_change.append(self._changed)
        stack.on_moved.append(self._moved)

    @classmethod
    def of(cls, stack: Stack, link: Link | None = None) -> Disk:
        """Return the disk that all clients of the export share; the caller has the turn, and closes it."""
        with _OPENING:
            found = next((disk for disk in cls._open if disk.stack is stack and disk.link is link), None)
            if found is None:
                found = cls(stack, link)
                cls._open.append(found)
            found._users += 1
            return found

    @classmethod
    def users(cls, stack: Stack, link: Link | None = None) -> int:
        """Return how many clients have that disk open, those included that are not told yet that they have.

        A caller who holds the turn knows that it stays so: `of` is called with the turn.
        """
        with _OPENING:
            return sum(disk._users for disk in cls._open if disk.stack is stack and disk.link is link)

    def close(self) -> None:
        """Let go of the disk; with its last user it hears no more of the stack."""
        with self.stack.turn, _OPENING:
            self._users -= 1
            if not self._users:
                self._open.remove(self)
                self.stack.on_change.remove(self._changed)
                self.stack.on_moved.remove(self._moved)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with what the disk holds from `offset` on."""
        places, shift = self.places, self.places.shift
        length = len(view)
        unit = offset >> shift
        if (offset + length - 1) >> shift == unit:
            window = places.windows.get(unit >> WINDOW_SHIFT) or places.window(unit >> WINDOW_SHIFT)
            place = window[unit & _LAST]
            if place >= 0:
                inside = offset & (places.unit - 1)
                at = (place & OFFSET_MASK) + inside
                if os.preadv(self.stack.descriptors[place >> SLOT_SHIFT], [view], at) == length:
                    return
        done = 0
        for first, size, place in self._runs(offset, length):
            self._read_run(first, view[done : done + size], place)
            done += size

    def stored(self, offset: int, length: int) -> tuple[int, int] | None:
        """Return where the range is, (descriptor, offset in its file); None where it is not stored in one piece."""
        places, shift = self.places, self.places.shift
        unit, last = offset >> shift, (offset + length - 1) >> shift
        place = expected = places.window(unit >> WINDOW_SHIFT)[unit & _LAST]
        if place < 0:
            return None
        while unit < last:
            unit += 1
            expected += places.unit
            if places.window(unit >> WINDOW_SHIFT)[unit & _LAST] != expected:
                return None
        return self.stack.descriptors[place >> SLOT_SHIFT], (place & OFFSET_MASK) + (offset & (places.unit - 1))

    def write(self, offset: int, data: memoryview) -> None:
        """Write `data` at `offset`: stored grains of the top in place, all else as new grains."""
        stack, places, shift = self.stack, self.places, self.places.shift
        if not stack.writing:
            stack.begin_writing()
        length = len(data)
        unit = offset >> shift
        if (offset + length - 1) >> shift == unit:
            window = places.windows.get(unit >> WINDOW_SHIFT) or places.window(unit >> WINDOW_SHIFT)
            place = window[unit & _LAST]
            if place >= 0 and place >> SLOT_SHIFT in stack.top_slots:
                at = (place & OFFSET_MASK) + (offset & (places.unit - 1))
                stack.touched = True
                if os.pwrite(stack.descriptors[place >> SLOT_SHIFT], data, at) == length:
                    return
        done = 0
        for first, size, place in self._runs(offset, length):
            piece = data[done : done + size]
            if place >= 0 and place >> SLOT_SHIFT in stack.top_slots:
                self._write_stored(place, piece)
            else:
                self._write_new(first, piece, place)
            done += size
        if stack.log is not None and len(stack.log) > MOST_NOTED:
            self.flush()

    def zero(self, offset: int, length: int, *, keep_space: bool = False, fast: bool = False) -> None:
        """Make the range read as zeros; where it does already, nothing is stored. Space is given back if it may be.

        Raises:
            OSError: ENOTSUP: it was to be `fast`, and would take as long as writing zeros; nothing was changed.
        """
        if fast and (keep_space or self._lean is None):
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        if not self.stack.writing:
            self.stack.begin_writing()
        for first, size, place in self._runs(offset, length):
            if place == ZERO:
                continue
            if place >= 0 and place >> SLOT_SHIFT in self.stack.top_slots:
                self._zero_stored(place, size, punch=not keep_space)
            else:
                self._zero_hidden(first, size)

    def trim(self, offset: int, length: int) -> None:
        """Give back the space of what the top stores of the range, which then reads as zeros; leave the rest alone."""
        for _, size, place in self._runs(offset, length):
            if place >= 0 and place >> SLOT_SHIFT in self.stack.top_slots:
                if not self.stack.writing:
                    self.stack.begin_writing()
                self._zero_stored(place, size, punch=True)

    def flush(self) -> None:
        """Make all that any connection has written durable."""
        self.stack.flush()

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield (offset, length, place of its first byte), neighbours that follow each other in a file joined."""
        places, shift, unit_bytes = self.places, self.places.shift, self.places.unit
        end = offset + length
        while offset < end:
            unit = offset >> shift
            first = offset
            place = places.window(unit >> WINDOW_SHIFT)[unit & _LAST]
            inside = offset & (unit_bytes - 1)
            offset = min(end, (unit + 1) << shift)
            step = unit_bytes if place >= 0 else 0
            expected = place + step
            while offset < end and place != MIXED:
                unit += 1
                if places.window(unit >> WINDOW_SHIFT)[unit & _LAST] != expected:
                    break
                expected += step
                offset = min(end, (unit + 1) << shift)
            yield first, offset - first, place + inside if place >= 0 else place

    def _read_run(self, offset: int, view: memoryview, place: int) -> None:
        if place == MIXED:
            view[:] = self.stack.chain.read_below(self.places.depth, offset, len(view))
            return
        done = 0
        if place >= 0:
            descriptor, at = self.stack.descriptors[place >> SLOT_SHIFT], place & OFFSET_MASK
            while done < len(view) and (got := os.preadv(descriptor, [view[done:]], at + done)):
                done += got
        while done < len(view):  # zeros, or past the end of a file that its writer cut short
            step = min(len(view) - done, len(_ZEROS))
            view[done : done + step] = _ZEROS[:step]
            done += step

    def _write_stored(self, place: int, data: memoryview) -> None:
        descriptor, at = self.stack.descriptors[place >> SLOT_SHIFT], place & OFFSET_MASK
        self.stack.touched = True
        with naming(self.stack.top.path):
            done = 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], at + done)

    def _write_new(self, offset: int, data: memoryview, place: int) -> None:
        """Write where the top stores nothing, or in pieces: by the chain, whose tables are asked afterwards."""
        chain = self.stack.chain
        assert isinstance(chain, WritableChain)
        if self._lean is None:
            chain.write_at(offset, data)
            self.places.forget(offset, len(data))
            return
        extent, unit, done = self._lean.extent, self.places.unit, 0
        assert isinstance(extent, GrainExtent)
        while done < len(data):
            at = offset + done
            inside = at & (unit - 1)
            whole = 0 if inside else (len(data) - done) // unit * unit
            if whole:
                self._placed(at, whole, extent.append(at >> self.places.shift, data[done : done + whole]))
                done += whole
                continue
            piece = data[done : done + unit - inside]
            self._write_part(extent, at, piece, place + done if place >= 0 else place)
            done += len(piece)

    def _write_part(self, extent: GrainExtent, offset: int, data: memoryview, place: int) -> None:
        """Write a part of one grain that the top does not store; `place` is where the byte at `offset` is now."""
        shift, unit = self.places.shift, self.places.unit
        grain, inside = offset >> shift, offset & (unit - 1)
        start = offset - inside
        if place == ZERO:  # the rest of the grain is a hole of the file, which costs nothing
            position = extent.append_hole(grain)
            self._placed(start, unit, position)
            self._write_stored(self._top_slot | position + inside, data)
            return
        whole = self._grain[:unit]
        real = min(unit, self.capacity - start)
        self._read_run(start, whole[:real], place - inside if place >= 0 else place)
        whole[real:] = bytes(unit - real)
        whole[inside : inside + len(data)] = data
        self._placed(start, unit, extent.append(grain, whole))

    def _placed(self, offset: int, length: int, position: int) -> None:
        """Note that the top stores grains from `offset` on, at `position` of its file."""
        places, shift, unit_bytes = self.places, self.places.shift, self.places.unit
        place = self._top_slot | position
        for unit in range(offset >> shift, offset + length >> shift):
            places.window(unit >> WINDOW_SHIFT)[unit & _LAST] = place
            place += unit_bytes

    def _learn(self, offset: int, length: int) -> None:
        """Note the places of grains that the top has just named."""
        assert self._lean is not None
        extent, places, shift = self._lean.extent, self.places, self.places.shift
        assert isinstance(extent, GrainExtent)
        slot = int(self.stack.slots[self._lean.source]) << SLOT_SHIFT
        entry_of = extent.tables.entry
        for unit in range(offset >> shift, (offset + length - 1 >> shift) + 1):
            entry = entry_of(unit)
            place = slot | sector_bytes(entry) if entry > GTE_ZEROED else ZERO
            places.window(unit >> WINDOW_SHIFT)[unit & _LAST] = place

    def _zero_stored(self, place: int, length: int, *, punch: bool) -> None:
        if punch:
            file = self.stack.files[place >> SLOT_SHIFT]
            self.stack.touched = True
            if file.discard_range(place & OFFSET_MASK, length):
                return
        for done in range(0, length, len(_ZEROS)):
            self._write_stored(place + done, _ZEROS[: min(len(_ZEROS), length - done)])

    def _zero_hidden(self, offset: int, length: int) -> None:
        """Hide what the links below the top hold: whole grains by a mark or a hole, parts of one by zeros."""
        unit, end = self.places.unit, offset + length
        first = min(end, -(-offset // unit) * unit)
        last = max(first, end if end == self.capacity else end - end % unit)
        self._write_zeros(offset, first)
        if first < last:
            if self._lean is None:
                self._write_zeros(first, last)
            else:
                self._hide_grains(first, last)
        self._write_zeros(last, end)

    def _hide_grains(self, first: int, last: int) -> None:
        assert self._lean is not None
        extent = self._lean.extent
        assert isinstance(extent, GrainExtent)
        step = 64 * MIB
        for start in range(first, last, step):
            length = min(step, last - start)
            if not extent.zero(start, length):
                # The file grows by a hole, which reads as zeros.
                position = extent.reserve(start, length)
                extent.file.truncate(position + -(-length // self.places.unit) * self.places.unit)
            self._learn(start, length)

    def _write_zeros(self, start: int, end: int) -> None:
        for at in range(start, end, len(_ZEROS)):
            self.write(at, _ZEROS[: min(len(_ZEROS), end - at)])

    def _changed(self, keep_places: bool) -> None:
        self.gone = self.link is not None and self.link not in self.stack.links
        if self.gone:
            return
        if not keep_places or (self.link is None and self.places.unit != unit_of(self.stack.top)):
            self.places = Places(self.stack, self.link)
            self.capacity = self.places.capacity
        top = self.stack.top
        self._lean = None
        if not self.read_only and len(top.extents) == 1:
            extent = top.extents[0].extent
            if isinstance(extent, GrainExtent) and extent.grain_bytes == self.places.unit:
                self._lean = top.extents[0]
                self._top_slot = int(self.stack.slots[self._lean.source]) << SLOT_SHIFT
                if len(self._grain) < self.places.unit:
                    self._grain = memoryview(bytearray(self.places.unit))

    def _moved(self, offset: int, length: int) -> None:
        self.places.forget(offset, length)
