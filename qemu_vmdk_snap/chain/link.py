"""One link of a chain: a descriptor, where it is stored, and the extents it names, open and locked."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from pathlib import Path

from qemu_vmdk_snap.chain.identity import with_fresh_cid
from qemu_vmdk_snap.chain.look import notes, opening
from qemu_vmdk_snap.chain.resolver import Resolver, check_opened, confined
from qemu_vmdk_snap.chain.windows import windows
from qemu_vmdk_snap.errors import FormatError, Unsupported
from qemu_vmdk_snap.light import TYPE_CHECKING, Final
from qemu_vmdk_snap.storage.blockfile import BlockFile, FileOpener, open_posix, open_posix_or_device
from qemu_vmdk_snap.storage.limits import allow_open_files
from qemu_vmdk_snap.storage.locks import keep_from_writers
from qemu_vmdk_snap.storage.opening import open_locked
from qemu_vmdk_snap.units import SECTOR_SIZE, sector_bytes
from qemu_vmdk_snap.vmdk.cowd.header import COWD_MAGIC, legacy_descriptor, read_cowd_header
from qemu_vmdk_snap.vmdk.descriptor import HEAD_BYTES, MAX_BYTES, Descriptor, ExtentLine, is_descriptor
from qemu_vmdk_snap.vmdk.extent import ExtentSpec, PlacedExtent, open_extent
from qemu_vmdk_snap.vmdk.noted import Notes
from qemu_vmdk_snap.vmdk.sparse.header import MAGIC, SparseExtentHeader, check_header

if TYPE_CHECKING:
    from qemu_vmdk_snap.vmdk.runs import RunTable

_MAX_SECTORS: Final = (1 << 63) // SECTOR_SIZE
_MANY_FILES: Final = 100
_DEVICE_TYPES: Final = ("VMFSRDM", "VMFSRAW")


class Link:
    """One open image of a chain. Offsets are bytes of the guest's disk. Threads: one at a time."""

    def __init__(
        self,
        file: BlockFile,
        descriptor: Descriptor,
        extents: list[PlacedExtent],
        files: list[BlockFile],
        embedded: bool,
    ) -> None:
        self.file = file
        self.path = file.path
        self.descriptor = descriptor
        self.extents = extents
        self.embedded = embedded
        self.opened_notes: list[str] = []
        """Notes made when it was opened, in addition to those of its extents."""
        self._files = files
        self._starts = [placed.start for placed in extents]
        self.capacity = sector_bytes(descriptor.sectors)

    @property
    def cid(self) -> int:
        """The link's content ID."""
        return self.descriptor.cid

    @property
    def parent_cid(self) -> int:
        """The CID its parent had when the link was made; `NO_PARENT` for a base."""
        return self.descriptor.parent_cid

    @property
    def hint(self) -> str | None:
        """The name of its parent as the descriptor has it, or None for a base."""
        return self.descriptor.parent_hint

    @property
    def grain_bytes(self) -> int:
        """The smallest unit that any of its extents allocates."""
        return min((placed.extent.grain_bytes for placed in self.extents), default=SECTOR_SIZE)

    @property
    def files(self) -> list[BlockFile]:
        """Every file of the link, the descriptor's first."""
        return self._files

    @property
    def notes(self) -> list[str]:
        """Faults that do not prevent reading: one line for each kind."""
        found = Notes()
        for placed in self.extents:
            found.merge(placed.extent.notes)
        return [*self.opened_notes, *found]

    def at(self, offset: int) -> PlacedExtent:
        """Return the extent that holds the byte at `offset`, which must be below the capacity."""
        return self.extents[bisect.bisect_right(self._starts, offset) - 1]

    def overlapping(self, start: int, end: int) -> Iterator[tuple[PlacedExtent, int, int]]:
        """Yield the extents that share bytes with [start, end), and what they share, in extent offsets."""
        for placed in self.extents:
            first = max(start, placed.start)
            last = min(end, placed.start + placed.extent.capacity)
            if first < last:
                yield placed, first - placed.start, last - placed.start

    def resolve(self, start: int, end: int) -> RunTable:
        """Return the runs of [start, end) in this link alone; zeros past its capacity."""
        from qemu_vmdk_snap.vmdk.runs import ZERO, RunTable  # NumPy: not needed to read a descriptor

        tables = [
            placed.extent.resolve(first, last).with_source(placed.source).shifted(placed.start)
            for placed, first, last in self.overlapping(start, end)
        ]
        if end > self.capacity:
            tables.append(RunTable.single(max(start, self.capacity), end, ZERO))
        return RunTable.concatenate(tables)

    def tables(self) -> Iterator[RunTable]:
        """Yield the runs of this link alone, one table for each bounded window of the disk."""
        for start, end in windows([self.extents], 0, self.capacity):
            yield self.resolve(start, end)

    def renew_cid(self) -> None:
        """Give the link a new CID, durably, and update the values derived from it.

        Only the digits change, in place and as many as there were, so a power cut leaves the descriptor whole.
        """
        self.write_descriptor(with_fresh_cid(self.descriptor))

    def write_descriptor(self, new: Descriptor) -> None:
        """Store `new` over the descriptor of the link, durably; only the bytes that differ are written.

        Raises:
            Unsupported: it does not fit into the room that the header gives it.
        """
        old = self.descriptor.raw
        enclosed = new.base > 0
        if len(new.raw) > len(old) and enclosed:
            room = self._embedded_room()
            if len(new.raw) > room:
                raise Unsupported(self.path, f"a descriptor of {len(new.raw)} bytes does not fit into its {room} bytes")
        after = new.raw + bytes(max(0, len(old) - len(new.raw))) if enclosed else new.raw
        for start, end in _changes(old, after):
            self.file.write_at(new.base + start, after[start:end])
        if not enclosed and len(after) < len(old):
            self.file.truncate(len(after))
        self.file.flush()
        self.descriptor = new

    def _embedded_room(self) -> int:
        header = SparseExtentHeader.parse(self.file.read_at(0, SECTOR_SIZE), path=self.path)
        return sector_bytes(header.descriptor_size)

    def share(self) -> None:
        """Let others read the link, which was opened for writing; nobody may write it until it is closed."""
        for file in self._files:
            descriptor = file.fileno()
            if descriptor is not None:
                keep_from_writers(descriptor)

    def flush(self) -> None:
        """Return when every write to the link is durable."""
        for placed in self.extents:
            placed.extent.flush()

    def close(self) -> None:
        """Close the files, which releases the locks, and report the notes (`look.notes`)."""
        notes.say(self.notes)
        for file in self._files:
            file.close()


def _changes(old: bytes, new: bytes) -> list[tuple[int, int]]:
    """Return the stretches of `new` that differ from `old`, neighbours within a sector joined."""
    same = min(len(old), len(new))
    differing = [i for i in range(same) if old[i] != new[i]]
    stretches: list[list[int]] = []
    for i in differing:
        if stretches and i - stretches[-1][1] < 16:
            stretches[-1][1] = i + 1
        else:
            stretches.append([i, i + 1])
    if len(new) > same:
        stretches.append([same, len(new)])
    return [(start, end) for start, end in stretches]


def read_descriptor(file: BlockFile) -> tuple[Descriptor, bool]:
    """Return the descriptor of the image in `file`, and whether it is embedded in the extent that it records.

    Behind a header of capacity 0 it is not: it names its extents, as a descriptor in a file of its own does.

    Raises:
        FormatError: the file is not a VMDK image, or its descriptor is invalid.
        Unsupported: it is an extent of a disk whose descriptor is another file.
    """
    path = file.path
    head = file.read_at(0, SECTOR_SIZE)
    if head[:4] == MAGIC:
        header = SparseExtentHeader.parse(head, path=path)
        check_header(header, path, file.size(), tolerant=True)  # writers need more checks: those of the extent
        if not header.descriptor_offset:
            raise Unsupported(path, "has no descriptor: it is an extent; open the descriptor file that names it")
        base, size = sector_bytes(header.descriptor_offset), sector_bytes(header.descriptor_size)
        if size > MAX_BYTES:
            rule = f"must be at most {MAX_BYTES // SECTOR_SIZE}"
            at = header.offset_of("descriptor_size")
            raise FormatError(path, at, "descriptor_size", header.descriptor_size, rule)
        return Descriptor.parse(file.read_at(base, size), path=path, base=base), header.is_extent
    if head[:4] == COWD_MAGIC:
        opening.refuse_delta(path)
        return legacy_descriptor(read_cowd_header(file, path), path), True
    if is_descriptor(file.read_at(0, HEAD_BYTES)):
        if file.size() > MAX_BYTES:
            raise FormatError(path, 0, "descriptor", file.size(), f"must be at most {MAX_BYTES} bytes long")
        return Descriptor.parse(file.read_at(0, file.size()), path=path), False
    raise FormatError(path, 0, "magic", head[:4], "must be b'KDMV', or the text '# Disk DescriptorFile'")


def open_link(
    path: Path | str,
    *,
    opener: FileOpener = open_posix,
    writable: bool = False,
    trusted_dirs: Sequence[Path | str] = (),
    resolver: Resolver | None = None,
    first_source: int = 0,
    lock: bool = True,
    owner: Path | None = None,
) -> Link:
    """Open one image: its descriptor and its extents, locked as QEMU locks them.

    Extents are opened beside the image and below `trusted_dirs`; `resolver` replaces that rule. `first_source` is the
    number that its first extent gets among the sources of the chain, `owner` the image whose hint `resolver` followed
    to it.

    Raises:
        FormatError: what is on disk breaks the format.
        Unsupported: a kind of extent that is not available.
        LockBusy: another process has locked it.
        CorruptChain: an extent is missing or lies where it may not be opened.
    """
    path, find = Path(path), resolver or confined(trusted_dirs)
    files = _OpenFiles(path, opener, find, owner, lock=lock)
    try:
        file = files.open(path, writable)
        descriptor, embedded = read_descriptor(file)
        noticed = opening.look_at(descriptor, writable=writable)
        _refuse_writing_legacy(file, embedded and writable)
        lines = _checked_extents(descriptor, embedded)
        if len(lines) > _MANY_FILES:
            allow_open_files(len(lines))
        extents, start = [], 0
        for number, line in enumerate(lines):
            _refuse_device(line, path, opener)
            if embedded:
                _check_embedded(line, file)
            extent_file, extent_path, write = _extent_file(line, file, embedded, writable, find, files.open)
            extent = open_extent(ExtentSpec(line, extent_path, extent_file, write))
            extents.append(PlacedExtent(start, extent, first_source + number))
            start += sector_bytes(line.sectors)
    except BaseException:
        files.close()
        raise
    link = Link(file, descriptor, extents, files.all, embedded)
    link.opened_notes += noticed
    return link


class _OpenFiles:
    """The files of the image `path`, each opened once, if it may be opened, and locked if `lock` is set."""

    def __init__(self, path: Path, opener: FileOpener, resolver: Resolver, owner: Path | None, *, lock: bool) -> None:
        self.all: list[BlockFile] = []
        self._by_place: dict[tuple[Path, bool], BlockFile] = {}
        self._path, self._opener, self._resolver, self._owner, self._lock = path, opener, resolver, owner, lock

    def open(self, target: Path, write: bool) -> BlockFile:
        key = target.resolve(), write
        if (
            key in self._by_place
        ):  # another extent in the same file: a second descriptor would be locked out by the first
            return self._by_place[key]
        opener = self._opener
        file = open_locked(target, opener, writable=write) if self._lock else opener(target, write)
        self._by_place[key] = file
        self.all.append(file)
        if target is not self._path:
            check_opened(self._resolver, self._path, file, "extent")
        elif self._owner is not None:
            check_opened(self._resolver, self._owner, file, "parent")
        return file

    def close(self) -> None:
        for file in self.all:
            file.close()


def _check_embedded(line: ExtentLine, file: BlockFile) -> None:
    """Check that the line of an embedded descriptor describes the sparse extent that contains it."""
    head = file.read_at(0, SECTOR_SIZE)
    if head[:4] != MAGIC:
        return
    if line.type != "SPARSE":
        rule = "must be SPARSE: the descriptor is embedded in a sparse extent"
        raise FormatError(file.path, line.at, "extent type", line.type, rule)
    header = SparseExtentHeader.parse(head, path=file.path)
    if header.capacity - line.sectors >= header.grain_size:
        rule = f"must be the {header.capacity} sectors of the header"
        raise FormatError(file.path, line.at, "extent sectors", line.sectors, rule)


def _refuse_device(line: ExtentLine, path: Path, opener: FileOpener) -> None:
    """Refuse an extent that is a device of the machine, unless the opener is one that takes devices."""
    name = line.file or ""
    device = line.type in _DEVICE_TYPES or name.startswith(("/dev/", "\\\\.\\"))
    if device and line.access != "NOACCESS" and opener is not open_posix_or_device:
        feature = f"its extent is the device {name!r}: opened only where that is allowed (--allow-devices)"
        raise Unsupported(path, f"byte {line.at:#x}: {feature}")


def _refuse_writing_legacy(file: BlockFile, writable: bool) -> None:
    if writable and file.read_at(0, 4) == COWD_MAGIC:
        raise Unsupported(file.path, "COWD disks without a descriptor are read-only: there is no CID to renew")


def _checked_extents(descriptor: Descriptor, embedded: bool) -> tuple[ExtentLine, ...]:
    path, lines = descriptor.path, descriptor.extents
    _ = (
        descriptor.cid,
        descriptor.parent_cid,
        descriptor.create_type,
    )  # an extent without these is refused here, by name
    if not lines or not descriptor.sectors:
        raise FormatError(path, descriptor.base, "extents", len(lines), "must give the disk at least one sector")
    if descriptor.sectors >= _MAX_SECTORS:
        raise FormatError(path, lines[0].at, "sectors", descriptor.sectors, "must be below 2^54 in all")
    for line in lines:
        if line.offset + line.sectors >= _MAX_SECTORS:
            raise FormatError(path, line.at, "extent offset", line.offset, "must end the extent below sector 2^54")
    if embedded and len(lines) > 1:
        raise Unsupported(path, f"byte {lines[1].at:#x}: an embedded descriptor with more than one extent")
    return lines


def _extent_file(
    line: ExtentLine,
    file: BlockFile,
    embedded: bool,
    writable: bool,
    resolver: Resolver,
    opened: FileOpener,
) -> tuple[BlockFile | None, Path, bool]:
    if embedded:
        return file, file.path, writable  # whatever the line calls it: the file may have been renamed
    write = writable and line.access == "RW"
    if line.file is None or line.access == "NOACCESS":
        return None, file.path, write
    path = resolver(file.path, line.file, "extent")
    return opened(path, write), path, write
