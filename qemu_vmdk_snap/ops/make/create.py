"""New images: an empty disk, and an overlay on another image."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from qemu_vmdk_snap.chain.identity import base_uuids, hint_to, new_cid, overlay_uuids
from qemu_vmdk_snap.chain.link import read_descriptor
from qemu_vmdk_snap.chain.look import notes
from qemu_vmdk_snap.chain.look.opening import look_at
from qemu_vmdk_snap.chain.resolver import check_opened, confined
from qemu_vmdk_snap.errors import CorruptChain, InvalidRequest
from qemu_vmdk_snap.light import TYPE_CHECKING, Final, replace
from qemu_vmdk_snap.ops.make.allocate import replace_empty
from qemu_vmdk_snap.ops.make.base_notes import base_notes
from qemu_vmdk_snap.ops.make.layout import (
    DEFAULT_GRAIN,
    ImageOptions,
    Plan,
    bulk_writer,
    kind_for,
    plan_image,
    stream_writer,
    write_image,
)
from qemu_vmdk_snap.storage.blockfile import BlockFile, PosixFile, open_posix
from qemu_vmdk_snap.storage.durable import NewFiles
from qemu_vmdk_snap.storage.identity import Identity, identity_of
from qemu_vmdk_snap.storage.locks import lock_image
from qemu_vmdk_snap.units import GIB, SECTOR_SIZE, TIB, byte_sectors
from qemu_vmdk_snap.vmdk.descriptor import NO_PARENT, Descriptor
from qemu_vmdk_snap.vmdk.sparse.header import MAGIC, MAX_GRAIN_SECTORS, HeaderFlag, SparseExtentHeader

if TYPE_CHECKING:
    from qemu_vmdk_snap.vmdk.grain.bulk import BulkWriter

__all__ = [
    "ImageOptions",
    "create_image",
    "create_overlay",
    "inherited_options",
    "open_new_image",
    "open_new_stream",
]

ADAPTER_TYPES: Final = ("ide", "buslogic", "lsilogic", "legacyESX")
MIN_GRAIN: Final = 4 << 10
MAX_CAPACITY: Final = 64 * TIB
"""VMware's limit for any disk is 62 TiB; a larger one's tables would not fit QEMU's limits at the default grain."""

_INHERITED: Final = ("adapterType", "geometry.cylinders", "geometry.heads", "geometry.sectors", "virtualHWVersion")


def create_image(
    path: Path | str,
    size: int,
    *,
    kind: str | None = None,
    options: ImageOptions | None = None,
    durable: bool = True,
    mode: int = 0o666,
    over_empty: bool = False,
) -> None:
    """Make `path` an empty image of `size` guest bytes (rounded up to a sector).

    `kind` replaces `options.subformat`. Names of extent files are derived from the image's; all files appear
    together, or none. `durable=False` does not wait for the disk: for images that are temporary. `over_empty`
    lets the image replace an empty file that nothing needs.

    Raises:
        FileExistsError: the name, or that of an extent, exists; that file is not changed.
        InvalidRequest: the size, the kind or an option is invalid.
        Unsupported: the size exceeds what the kind can store.
    """
    path, options = Path(path), _with_kind(options or ImageOptions(), kind)
    plan = plan_base(path, size, options)
    with NewFiles(durable=durable) as files:
        if over_empty:
            replace_empty(files, path)
        made = write_image(files, path, plan, mode)
        if plan.kind.stream:
            bulk_writer(plan, made).finish()


def create_overlay(
    path: Path | str,
    base: Path | str,
    *,
    hint: str | None = None,
    size: int | None = None,
    kind: str | None = None,
    options: ImageOptions | None = None,
    durable: bool = True,
    mode: int = 0o666,
    name: str | None = None,
    over_empty: bool = False,
) -> None:
    """Make `path` an empty overlay on `base`: same size, grain, adapter, geometry and hardware version.

    `base` may be open in a running QEMU: it is read as `qemu-img -U` reads it. `hint` is the overlay's name for its
    parent; by default the path to `base` from the overlay's folder. `options` replaces what would be inherited; begin
    with `inherited_options` to change a part of it. `kind` replaces its `subformat`. The geometry is the base's
    unless the adapter is another. `name` is what the overlay will be called, where that is not `path` yet. `over_empty`
    lets it take the place of an empty file that nothing needs.

    Raises:
        FileExistsError: the name exists; that file is not changed.
        FormatError: `base` is not a VMDK image, or breaks the format.
        InvalidRequest: `size` is smaller than the base, an option is invalid, or the kind cannot have a parent.
    """
    path, base = Path(path), Path(base)
    identity = identity_of(base)
    if _read_base(base)[0].cid == NO_PARENT:
        _give_cid(base)
    descriptor, inherited, said = _read_base(base, look=True)
    notes.say(said)
    chosen = _with_kind(options or inherited, kind)
    _check_options(path, chosen)
    sectors = descriptor.sectors if size is None else _checked_sectors(path, size)
    if sectors < descriptor.sectors:
        raise InvalidRequest(
            path, f"size {sectors * SECTOR_SIZE} is less than the {descriptor.sectors * SECTOR_SIZE} of its base"
        )
    ddb = {key: value for key in _INHERITED if (value := descriptor.get(f"ddb.{key}")) is not None}
    if options is not None or not ddb:
        same = ddb if chosen.adapter_type == inherited.adapter_type else {}  # the geometry is the adapter's
        ddb = {**_ddb(sectors, chosen), **same, "virtualHWVersion": chosen.hwversion}
    cid = new_cid(avoid=descriptor.cid)
    plan = plan_image(
        path,
        name or path.name,
        sectors,
        chosen,
        cid=cid,
        parent_cid=descriptor.cid,
        hint=hint_to(path, base) if hint is None else hint,
        ddb={**ddb, "longContentID": _long_id(cid), **overlay_uuids(descriptor)},
    )
    with NewFiles(durable=durable) as files:
        if over_empty:
            replace_empty(files, path)
        write_image(files, path, plan, mode)
        files.before_ready(lambda: _require_still(base, identity, descriptor.cid))


def _require_still(base: Path, identity: Identity | None, cid: int) -> None:
    """Refuse a base that an operation removes or changes while an overlay on it is created.

    Checked when the overlay has its name: an operation that begins later sees the overlay.
    """
    if any(name.endswith(".intent") for name in os.listdir(base.parent)):  # noqa: PTH208 - names are all it takes
        from qemu_vmdk_snap.storage.journal.record import refuse_pending  # JSON and more: rarely needed

        refuse_pending(base)
    if identity_of(base) != identity:
        raise CorruptChain(base, "was removed or replaced while an overlay on it was made")
    if _read_base(base)[0].cid != cid and identity_of(base) == identity:
        raise CorruptChain(base, "was written while an overlay on it was made")


def _give_cid(base: Path) -> None:
    """Give a base another CID than ffffffff, which means "no parent" in the parentCID of an overlay.

    Raises:
        StillNeeded: something is backed by it already.
        Unsupported, LockBusy, OSError: it cannot be written.
    """
    # NumPy and more: rarely needed.
    from qemu_vmdk_snap.chain.change import open_link_for_change
    from qemu_vmdk_snap.chain.needs.dependents import Census, require_unneeded, search_folders

    find = confined()
    with contextlib.ExitStack() as stack:
        link = open_link_for_change(base, resolver=find, opener=open_posix, stack=stack)
        files = [file.path for file in link.files]
        require_unneeded(base, files, Census.of(search_folders(files, find)))
        link.renew_cid()


def inherited_options(base: Path | str) -> ImageOptions:
    """Return what an overlay on `base` inherits, its kind aside; reads the base as `create_overlay` does."""
    return _read_base(Path(base))[1]


def open_new_image(files: NewFiles, path: Path, size: int, options: ImageOptions) -> BulkWriter:
    """Return the writer that fills a new image, which appears as `path` with the other `files`.

    Raises:
        FileExistsError: the name exists; that file is not changed.
        InvalidRequest: the size or an option is invalid.
    """
    plan = plan_base(path, size, options)
    return bulk_writer(plan, write_image(files, path, plan))


def open_new_stream(write: Callable[[bytes], object], path: Path, size: int, options: ImageOptions) -> BulkWriter:
    """Return the writer of a streamOptimized image that passes its bytes in order to `write`; `path` names it.

    Raises:
        InvalidRequest: the size or an option is invalid.
    """
    return stream_writer(plan_base(path, size, replace(options, subformat="streamOptimized")), write)


def plan_base(path: Path, size: int, options: ImageOptions) -> Plan:
    """Return the plan of a new image of `size` bytes without a parent.

    Raises:
        InvalidRequest: the size or an option is invalid.
    """
    sectors = _checked_sectors(path, size)
    _check_options(path, options)
    ddb = _base_ddb(sectors, options)
    for key, value in kind_for(path, options).ddb:
        ddb.setdefault(key, value)
    cid = new_cid()
    ddb = {**ddb, "longContentID": _long_id(cid), **{key: ddb.get(key, value) for key, value in base_uuids().items()}}
    return plan_image(path, path.name, sectors, options, cid=cid, parent_cid=NO_PARENT, hint=None, ddb=ddb)


def _long_id(cid: int) -> str:
    return f"{os.urandom(12).hex()}{cid:08x}"


def _with_kind(options: ImageOptions, kind: str | None) -> ImageOptions:
    return options if kind is None else replace(options, subformat=kind)


def _read_base(base: Path, *, look: bool = False) -> tuple[Descriptor, ImageOptions, list[str]]:
    """Return the descriptor of the base, what an overlay inherits from it, and with `look` its faults."""
    file = PosixFile.open(base)
    try:
        lock_image(file.fileno(), base, writable=False, share_writes=True)
        descriptor, embedded = read_descriptor(file)
        while (again := read_descriptor(file)[0]).raw != descriptor.raw:
            descriptor = again  # a writer was changing its CID
        said = look_at(descriptor, writable=False)
        if look:
            said += base_notes(file, descriptor, embedded, confined())
        return descriptor, _inherited_options(file, descriptor, embedded), said
    finally:
        file.close()


def _inherited_options(file: BlockFile, descriptor: Descriptor, embedded: bool) -> ImageOptions:
    grain, zeroed = DEFAULT_GRAIN, False
    header = _first_header(file, descriptor, embedded)
    if header is not None:
        grain = max(MIN_GRAIN, header.grain_size * SECTOR_SIZE)
        zeroed = header.version == 2 and bool(header.flags & HeaderFlag.ZEROED_GRAINS)
    return ImageOptions(
        grain_size=grain,
        adapter_type=descriptor.get("ddb.adapterType") or "ide",
        hwversion=descriptor.get("ddb.virtualHWVersion") or "4",
        zeroed_grain=zeroed,
    )


def _first_header(file: BlockFile, descriptor: Descriptor, embedded: bool) -> SparseExtentHeader | None:
    """Return the header of the first hosted sparse extent, if there is one that can be read."""
    head = file.read_at(0, SECTOR_SIZE)
    line = next((line for line in descriptor.extents if line.type == "SPARSE"), None)
    if not embedded and line is not None and line.file is not None:
        with contextlib.suppress(OSError, CorruptChain):
            find = confined()
            extent = PosixFile.open(find(file.path, line.file, "extent"))
            try:
                check_opened(find, file.path, extent, "extent")
                head = extent.read_at(0, SECTOR_SIZE)
            finally:
                extent.close()
    if head[:4] != MAGIC or len(head) != SECTOR_SIZE:
        return None
    return SparseExtentHeader.parse(head, path=file.path)


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
