"""Makes COWD and seSparse files from the description of the format alone: no code of the engine, so that a shared
misreading cannot hide.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

SECTOR = 512


def descriptor(
    path: Path,
    kind: str,
    extents: Sequence[str],
    *,
    cid: int = 0x12345678,
    parent_cid: int = 0xFFFFFFFF,
    hint: str | None = None,
) -> Path:
    """Write a descriptor file as ESXi does and return its path."""
    lines = ["# Disk DescriptorFile", "version=1", 'encoding="UTF-8"', f"CID={cid:08x}", f"parentCID={parent_cid:08x}"]
    lines += ['isNativeSnapshot="no"', f'createType="{kind}"']
    lines += [f'parentFileNameHint="{hint}"'] if hint else []
    lines += ["# Extent description", *extents, "", "# The Disk Data Base ", "#DDB", "", 'ddb.adapterType = "lsilogic"']
    path.write_text("\n".join(lines) + "\n")
    return path


def cowd(
    path: Path,
    sectors: int,
    grains: Mapping[int, bytes],
    *,
    grain_sectors: int = 1,
    flags: int = 3,
    parent: bytes = b"",
    parent_generation: int = 0,
    generation: int = 0,
    free_slack: int = 0,
) -> None:
    """Write a COWD extent with the given grains (by number); tables exist only where a grain needs one."""
    unit = grain_sectors * SECTOR
    table_count = -(-sectors // (4096 * grain_sectors))
    gd_sectors = -(-table_count * 4 // SECTOR)
    at = 4 + gd_sectors
    directory = [0] * table_count
    body = bytearray()
    for table in sorted({grain // 4096 for grain in grains}):
        entries = [0] * 4096
        directory[table] = at + len(body) // SECTOR
        table_at = len(body)
        body += bytes(4096 * 4)
        for grain in sorted(grain for grain in grains if grain // 4096 == table):
            entries[grain % 4096] = at + len(body) // SECTOR
            body += grains[grain].ljust(unit, b"\0")
        body[table_at : table_at + 4096 * 4] = struct.pack("<4096I", *entries)
    free = at + len(body) // SECTOR + free_slack
    header = struct.pack("<4sIIIIIII", b"COWD", 1, flags, sectors, grain_sectors, 4, table_count, free)
    header += struct.pack("<1024sI", parent, parent_generation)
    header += struct.pack("<I60s512sI8sI", generation, b"name", b"description", 0, b"", 0)
    raw = header.ljust(2048, b"\0") + struct.pack(f"<{table_count}I", *directory).ljust(gd_sectors * SECTOR, b"\0")
    path.write_bytes(raw + body)


def sesparse(
    path: Path,
    sectors: int,
    grains: Mapping[int, bytes | str],
    *,
    replay: int = 0,
    first_table: int = 3,
    first_grain: int = 5,
    **fields: int,
) -> None:
    """Write a seSparse extent. A grain is its 4096 bytes, or `unmapped` or `zero`.

    Tables and grains begin with numbers other than 0, so that a reader that ignores them is found out.
    """
    table_count = -(-sectors // (8 * 4096))
    used = sorted({grain // 4096 for grain in grains})
    gd_sectors = -(-table_count * 8 // SECTOR)
    room = first_table + len(used)
    stored = [grain for grain in sorted(grains) if isinstance(grains[grain], bytes)]
    gd_at = 16
    tables_at = gd_at + gd_sectors
    grains_at = tables_at + room * 64
    directory = [0] * table_count
    tables = [[0] * 4096 for _ in range(room)]
    data = bytearray(first_grain * 4096)
    for position, table in enumerate(used):
        directory[table] = 0x1000000000000000 | (first_table + position)
    for grain, value in sorted(grains.items()):
        entries = tables[first_table + used.index(grain // 4096)]
        if value == "unmapped":
            entries[grain % 4096] = 0x1000000000000000
        elif value == "zero":
            entries[grain % 4096] = 0x2000000000000000
        else:
            number = first_grain + stored.index(grain)
            entries[grain % 4096] = 0x3000000000000000 | (number & 0xFFF) << 48 | number >> 12
            assert isinstance(value, bytes)
            data += value.ljust(4096, b"\0")
    values = {
        "magic": 0xCAFEBABE,
        "version": 0x200000001,
        "capacity": sectors,
        "grain_size": 8,
        "table_size": 64,
        "flags": 0,
        **{f"reserved{i}": 0 for i in range(1, 5)},
        "volatile_offset": 1,
        "volatile_size": 1,
        "journal_header_offset": 2,
        "journal_header_size": 2,
        "journal_offset": 4,
        "journal_size": 8,
        "gd_offset": gd_at,
        "gd_size": gd_sectors,
        "gt_offset": tables_at,
        "gt_size": room * 64,
        "bitmap_offset": 12,
        "bitmap_size": 2,
        "back_map_offset": 14,
        "back_map_size": 2,
        "grains_offset": grains_at,
        "grains_size": len(data) // SECTOR,
    } | fields
    raw = struct.pack("<26Q", *values.values()).ljust(SECTOR, b"\0")
    raw += struct.pack("<4Q", 0xCAFECAFE, room, 7, replay).ljust(SECTOR, b"\0")
    raw = raw.ljust(gd_at * SECTOR, b"\0") + struct.pack(f"<{table_count}Q", *directory).ljust(
        gd_sectors * SECTOR, b"\0"
    )
    path.write_bytes(raw + b"".join(struct.pack("<4096Q", *table) for table in tables) + data)
