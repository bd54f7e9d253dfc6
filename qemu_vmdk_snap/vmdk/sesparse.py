"""The seSparse extent (ESXi 6.5 and later): 64-bit entries, grains of 4 KiB. Read-only: its journal is not documented.

    | constant header | volatile header | journal ... | directory | tables | free bitmap | back map | grains |

Top nibble of a directory entry: 0 no table, 1 table (number in the low 32 bits). Of a table entry: 0 not stored,
1 unmapped by the guest, 2 zeroed, 3 stored: bits 48..59 are the low and bits 0..47 the high part of the grain's number.

Source: QEMU 7.2 block/vmdk.c (Sam Eiderman's reading of real images); libvmdk.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from qemu_vmdk_snap.errors import FormatError, Unsupported
from qemu_vmdk_snap.light import dataclass
from qemu_vmdk_snap.light import numpy as np
from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import SECTOR_SIZE, sector_bytes
from qemu_vmdk_snap.vmdk.extent import ExtentSpec, Place
from qemu_vmdk_snap.vmdk.grain.extent import Copy, GrainExtent
from qemu_vmdk_snap.vmdk.grain.tables import Entries, GrainTables
from qemu_vmdk_snap.vmdk.ondisk import U64, Must, OnDisk, Wire
from qemu_vmdk_snap.vmdk.runs import DATA, HOLE, ZERO, Int64s, Kinds

if TYPE_CHECKING:
    import numpy.typing as npt

CONST_MAGIC: Final = 0xCAFEBABE
VOLATILE_MAGIC: Final = 0xCAFECAFE
VERSION: Final = 0x2_0000_0001
GRAIN_SECTORS: Final = 8
TABLE_SECTORS: Final = 64
ENTRIES_PER_TABLE: Final = TABLE_SECTORS * SECTOR_SIZE // 8
_MAX_TABLES: Final = 1 << 22  # a disk of 64 TiB; VMware makes none above 62

_Zero = Annotated[int, Wire("Q"), Must(lambda v: v == 0, "must be 0: other values have no known meaning")]


@dataclass(frozen=True, slots=True)
class ConstHeader(OnDisk):
    """Sector 0; offsets and sizes count sectors."""

    magic: Annotated[int, Wire("Q"), Must(lambda v: v == CONST_MAGIC, "must be 0xcafebabe")]
    version: Annotated[int, Wire("Q"), Must(lambda v: v == VERSION, "must be 0x200000001")]
    capacity: U64
    grain_size: Annotated[int, Wire("Q"), Must(lambda v: v == GRAIN_SECTORS, "must be 8")]
    table_size: Annotated[int, Wire("Q"), Must(lambda v: v == TABLE_SECTORS, "must be 64")]
    flags: _Zero
    reserved1: _Zero
    reserved2: _Zero
    reserved3: _Zero
    reserved4: _Zero
    volatile_offset: U64
    volatile_size: U64
    journal_header_offset: U64
    journal_header_size: U64
    journal_offset: U64
    journal_size: U64
    directory_offset: U64
    directory_size: U64
    tables_offset: U64
    tables_size: U64
    free_bitmap_offset: U64
    free_bitmap_size: U64
    back_map_offset: U64
    back_map_size: U64
    grains_offset: U64
    grains_size: U64
    padding: Annotated[bytes, Wire("304s")]

    @property
    def tables(self) -> int:
        """Grain tables that the capacity needs."""
        return -(-self.capacity // (GRAIN_SECTORS * ENTRIES_PER_TABLE))


@dataclass(frozen=True, slots=True)
class VolatileHeader(OnDisk):
    """The header that ESXi rewrites while the disk is in use."""

    magic: Annotated[int, Wire("Q"), Must(lambda v: v == VOLATILE_MAGIC, "must be 0xcafecafe")]
    free_table: U64
    next_transaction: U64
    replay_journal: U64
    padding: Annotated[bytes, Wire("480s")]


def open_extent(spec: ExtentSpec) -> "SeSparseExtent":
    """Open a seSparse extent for reading.

    Raises:
        FormatError: the headers, or what they name, are invalid.
        Unsupported: write access, or a journal that has not been replayed.
    """
    file, path = spec.file, spec.path
    if file is None:
        raise FormatError(path, spec.line.at, "extent", spec.line.type, "must name a file")
    if spec.writable:
        raise Unsupported(path, "seSparse extents are read-only: convert it, or make an overlay on it, to write")
    header = ConstHeader.parse(file.read_at(0, SECTOR_SIZE), path=path)
    at = _inside(header, "volatile_offset", 1, path, file.size())
    volatile = VolatileHeader.parse(file.read_at(at, SECTOR_SIZE), path=path, base=at)
    if volatile.replay_journal:
        where = at + volatile.offset_of("replay_journal")
        raise Unsupported(path, f"byte {where:#x}: its journal has not been replayed: let ESXi open the disk once")
    if header.capacity < spec.line.sectors:
        rule = f"must be at least the {spec.line.sectors} sectors that the descriptor gives the extent"
        raise FormatError(path, header.offset_of("capacity"), "capacity", header.capacity, rule)
    _check_directory(header, path, file.size())
    return SeSparseExtent(file, path, header, sector_bytes(spec.line.sectors))


def _check_directory(header: ConstHeader, path: Path, file_size: int) -> None:
    if header.tables > _MAX_TABLES:
        rule = f"must need at most {_MAX_TABLES} grain directory entries, not {header.tables}"
        raise FormatError(path, header.offset_of("capacity"), "capacity", header.capacity, rule)
    if header.directory_size * SECTOR_SIZE < header.tables * 8:
        rule = f"must have room for the {header.tables} entries that the capacity needs"
        raise FormatError(path, header.offset_of("directory_size"), "directory_size", header.directory_size, rule)
    _inside(header, "directory_offset", -(-header.tables * 8 // SECTOR_SIZE), path, file_size)
    for field in ("tables_offset", "grains_offset"):
        if getattr(header, field) > 1 << 50:
            raise FormatError(path, header.offset_of(field), field, getattr(header, field), "must be below 2^50")


def _inside(header: ConstHeader, field: str, sectors: int, path: Path, file_size: int) -> int:
    start = getattr(header, field)
    if not start or (start + sectors) * SECTOR_SIZE > file_size:
        rule = f"must leave {sectors} sectors inside the file of {file_size} bytes"
        raise FormatError(path, header.offset_of(field), field, start, rule)
    return sector_bytes(start)


class SeSparseExtent(GrainExtent):
    """One open seSparse extent."""

    def __init__(self, file: BlockFile, path: Path, header: ConstHeader, capacity: int) -> None:
        self.header = header
        at = sector_bytes(header.directory_offset)
        entries = np.frombuffer(file.read_at(at, header.tables * 8), "<u8")
        sectors = _table_sectors(entries, header, path).astype("<u8").tobytes()
        tables = GrainTables(file, path, sectors, entries_per_table=ENTRIES_PER_TABLE, entry_size=8)
        super().__init__(file, path, [Copy(tables, at)], capacity=capacity, grain_bytes=sector_bytes(GRAIN_SECTORS))

    def lookup(self, offset: int) -> Place:
        """Return where the byte at `offset` is; the place ends with its grain."""
        grain, inside = divmod(offset, self._grain_bytes)
        kinds, places = self._decoded(grain, np.array([self.tables.entry(grain)], np.uint64))
        place = int(places[0]) + inside if kinds[0] == DATA else 0
        return Place(int(kinds[0]), place, min(self._grain_bytes - inside, self._capacity - offset))

    def _decoded(self, first: int, entries: Entries) -> tuple[Kinds, Int64s]:
        kind = entries >> np.uint64(60)
        low = (entries >> np.uint64(48)) & np.uint64(0xFFF)
        number = low | ((entries & np.uint64(0xFFFF_FFFF_FFFF)) << np.uint64(12))
        start = sector_bytes(self.header.grains_offset)
        limit = max(0, self._file_size - start)
        stored = kind == 3
        fits = number < np.uint64(-(-limit // self._grain_bytes))
        bad = (kind > 3) | ((kind == 0) & (entries != 0)) | (stored & ~fits)
        if bad.any():
            self._refuse(first + int(np.flatnonzero(bad)[0]), int(entries[np.flatnonzero(bad)[0]]))
        kinds = np.select([kind == 0, stored], [HOLE, DATA], ZERO).astype(np.uint8)
        places = np.where(stored, number, 0).astype(np.int64) * self._grain_bytes + start
        return kinds, places

    def _refuse(self, grain: int, entry: int) -> None:
        table, index = divmod(grain, ENTRIES_PER_TABLE)
        at = sector_bytes(self.tables.table_sector(table)) + 8 * index
        rule = f"must be 0, of kind 1 or 2, or place grain {grain} inside the file of {self._file_size} bytes"
        raise FormatError(self._path, at, "grain table entry", hex(entry), rule)


def _table_sectors(entries: "npt.NDArray[np.uint64]", header: ConstHeader, path: Path) -> Int64s:
    """Return the sector of each table, 0 where there is none."""
    number = entries & np.uint64(0xFFFF_FFFF)
    room = header.tables_size // TABLE_SECTORS
    used = entries != 0
    bad = used & ((entries >> np.uint64(32) != np.uint64(0x1000_0000)) | (number >= np.uint64(room)))
    if bad.any():
        index = int(np.flatnonzero(bad)[0])
        at = sector_bytes(header.directory_offset) + 8 * index
        rule = f"must be 0, or of kind 1 and name one of {room} tables"
        raise FormatError(path, at, f"grain directory entry {index}", hex(int(entries[index])), rule)
    sectors: Int64s = np.where(used, number.astype(np.int64) * TABLE_SECTORS + header.tables_offset, 0)
    return sectors
