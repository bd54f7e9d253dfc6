"""New images: an empty disk, and an overlay on another image."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qemu_vmdk_snap.chain.link import new_cid, read_descriptor
from qemu_vmdk_snap.errors import InvalidRequest
from qemu_vmdk_snap.storage.blockfile import BlockFile, PosixFile
from qemu_vmdk_snap.storage.durable import NewFiles, new_file
from qemu_vmdk_snap.units import GIB, SECTOR_SIZE, TIB, byte_sectors
from qemu_vmdk_snap.vmdk.descriptor import NO_PARENT, Descriptor, make_descriptor
from qemu_vmdk_snap.vmdk.header import MAGIC, MAX_GRAIN_SECTORS, SparseExtentHeader
from qemu_vmdk_snap.vmdk.sparse_layout import SparseLayout, plan_sparse, write_sparse

if TYPE_CHECKING:
    from qemu_vmdk_snap.vmdk.bulk import BulkWriter

ADAPTER_TYPES: Final = ("ide", "buslogic", "lsilogic", "legacyESX")
DEFAULT_GRAIN: Final = 64 << 10
MIN_GRAIN: Final = 4 << 10
MAX_CAPACITY: Final = 64 * TIB
"""VMware's limit for any disk is 62 TiB; a larger one's tables would not fit QEMU's limits at the default grain."""

_INHERITED: Final = ("adapterType", "geometry.cylinders", "geometry.heads", "geometry.sectors", "virtualHWVersion")


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """What a new image is like; the names are those of qemu-img's `-o`."""

    grain_size: int = DEFAULT_GRAIN
    """Bytes that are allocated at once: a power of two from 4 KiB to 1 GiB."""
    adapter_type: str = "ide"
    hwversion: str = "4"
    toolsversion: str | None = None
    zeroed_grain: bool = False
    """Let a grain be marked as zeros (version 2): over a parent's data too, and without storing it."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Further `ddb.` entries, keys without the prefix."""


def create_image(
    path: Path | str, size: int, *, options: ImageOptions | None = None, durable: bool = True, mode: int = 0o666
) -> None:
    """Make `path` an empty monolithicSparse image of `size` guest bytes (rounded up to a sector).

    `durable=False` does not wait for the disk: for images that are thrown away anyway.

    Raises:
        FileExistsError: something bears the name; it is untouched.
        InvalidRequest: the size or an option cannot be.
    """
    path, options = Path(path), options or ImageOptions()
    sectors = _checked_sectors(path, size)
    _check_options(path, options)
    layout, text = _plan(path.name, path, sectors, options, None, NO_PARENT, _base_ddb(sectors, options))
    with new_file(path, durable=durable, mode=mode) as file:
        write_sparse(file, layout, text)


def create_overlay(
    path: Path | str,
    base: Path | str,
    *,
    hint: str | None = None,
    size: int | None = None,
    options: ImageOptions | None = None,
    durable: bool = True,
    mode: int = 0o666,
    name: str | None = None,
) -> None:
    """Make `path` an empty overlay on `base`: same size, grain, adapter, geometry and hardware version.

    `base` is only read, without a lock: it may be open in a running QEMU, as long as its writer's CID is settled.
    `hint` is what the overlay calls its parent; by default the way to `base` from the overlay's folder. `options`
    replaces what would be inherited; `name` is what the overlay will be called, where that is not `path` yet.

    Raises:
        FileExistsError: something bears the name; it is untouched.
        FormatError: `base` is no VMDK, or breaks the format.
        InvalidRequest: `size` is smaller than the base, or an option cannot be.
    """
    path, base = Path(path), Path(base)
    file = PosixFile.open(base)
    try:
        descriptor, embedded = read_descriptor(file)
        inherited = _inherited_options(file, descriptor, embedded)
    finally:
        file.close()
    options = options or inherited
    _check_options(path, options)
    sectors = descriptor.sectors if size is None else _checked_sectors(path, size)
    if sectors < descriptor.sectors:
        raise InvalidRequest(
            path, f"size {sectors * SECTOR_SIZE} is less than the {descriptor.sectors * SECTOR_SIZE} of its base"
        )
    ddb = {key: value for key in _INHERITED if (value := descriptor.get(f"ddb.{key}")) is not None}
    if options is not inherited or not ddb:
        ddb = _ddb(sectors, options)
    hint = _hint(path, base) if hint is None else hint
    layout, text = _plan(name or path.name, path, sectors, options, hint, descriptor.cid, ddb)
    with new_file(path, durable=durable, mode=mode) as new:
        write_sparse(new, layout, text)


def open_new_image(files: NewFiles, path: Path, size: int, options: ImageOptions) -> BulkWriter:
    """Return the writer that fills a new image, which appears as `path` with the other `files`.

    Raises:
        FileExistsError: something bears the name; it is untouched.
        InvalidRequest: the size or an option cannot be.
    """
    from qemu_vmdk_snap.vmdk.bulk import BulkSparse  # NumPy: not needed to make an empty image

    sectors = _checked_sectors(path, size)
    _check_options(path, options)
    layout, text = _plan(path.name, path, sectors, options, None, NO_PARENT, _base_ddb(sectors, options))
    file = files.add(path)
    write_sparse(file, layout, text)
    return BulkSparse(file, layout)


def _plan(
    name: str,
    path: Path,
    sectors: int,
    options: ImageOptions,
    hint: str | None,
    parent_cid: int,
    ddb: Mapping[str, str],
) -> tuple[SparseLayout, bytes]:
    cid = new_cid(avoid=parent_cid)
    text = make_descriptor(
        cid=cid,
        parent_cid=parent_cid,
        create_type="monolithicSparse",
        hint=hint,
        extents=[("RW", sectors, "SPARSE", name, None)],
        ddb={**ddb, "longContentID": f"{os.urandom(12).hex()}{cid:08x}"},
        path=path,
    )
    layout = plan_sparse(
        sectors,
        grain_sectors=options.grain_size // SECTOR_SIZE,
        zeroed_grains=options.zeroed_grain,
        descriptor=text,
    )
    return layout, text


def _inherited_options(file: BlockFile, descriptor: Descriptor, embedded: bool) -> ImageOptions:
    grain, zeroed = DEFAULT_GRAIN, False
    head = file.read_at(0, SECTOR_SIZE)
    if embedded and head[:4] == MAGIC:
        header = SparseExtentHeader.parse(head, path=file.path)
        grain = max(MIN_GRAIN, header.grain_size * SECTOR_SIZE)
        zeroed = header.version == 2 and bool(header.flags & 4)
    return ImageOptions(
        grain_size=grain,
        adapter_type=descriptor.get("ddb.adapterType") or "ide",
        hwversion=descriptor.get("ddb.virtualHWVersion") or "4",
        zeroed_grain=zeroed,
    )


def _hint(path: Path, base: Path) -> str:
    """Return how `path` names `base`: relative where both are absolute in the end, as both may move together."""
    return os.path.relpath(base.parent.resolve() / base.name, path.parent.resolve())


def _checked_sectors(path: Path, size: int) -> int:
    if not 0 < size <= MAX_CAPACITY:
        raise InvalidRequest(path, f"size {size} must be from 1 to {MAX_CAPACITY} bytes")
    return byte_sectors(size)


def _check_options(path: Path, options: ImageOptions) -> None:
    grain = options.grain_size
    if not MIN_GRAIN <= grain <= MAX_GRAIN_SECTORS * SECTOR_SIZE or grain & (grain - 1):
        raise InvalidRequest(path, f"grain_size {grain} must be a power of two from 4096 to {GIB}")


def _base_ddb(sectors: int, options: ImageOptions) -> dict[str, str]:
    if options.adapter_type not in ADAPTER_TYPES:
        known = ", ".join(ADAPTER_TYPES)
        raise InvalidRequest("adapter_type", f"{options.adapter_type!r} is not one of {known}")
    random = os.urandom(13).hex(" ")
    # VMware's own prefix 60 00 C2 9x, eight bytes, a dash, eight bytes.
    uuid = f"60 00 C2 9{random[1:14]}-{random[15:]}"
    return {**_ddb(sectors, options), "uuid": uuid}


def _ddb(sectors: int, options: ImageOptions) -> dict[str, str]:
    heads = 16 if options.adapter_type == "ide" else 255
    ddb = {
        "virtualHWVersion": options.hwversion,
        "geometry.cylinders": str(min(sectors // (63 * heads), 65535)),
        "geometry.heads": str(heads),
        "geometry.sectors": "63",
        "adapterType": options.adapter_type,
    }
    if options.toolsversion is not None:
        ddb["toolsVersion"] = options.toolsversion
    return {**ddb, **options.extra}
