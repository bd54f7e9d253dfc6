"""The kinds of image that can be made, and what files an image of each consists of.

    monolithicSparse       one file with its descriptor inside
    streamOptimized        one file with its descriptor inside, written from start to end
    monolithicFlat         descriptor + NAME-flat.vmdk
    twoGbMaxExtentSparse   descriptor + NAME-s001.vmdk, -s002 ...   at most 2047 MiB of the disk in each
    twoGbMaxExtentFlat     descriptor + NAME-f001.vmdk, -f002 ...
    vmfs, vmfsThin         descriptor + NAME-flat.vmdk              ESXi's; vmfs has its space reserved
    vmfsSparse             descriptor + NAME-delta.vmdk             ESXi's deltas

The files of an image appear together, the descriptor last.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from qemu_vmdk_snap.chain.link import read_descriptor
from qemu_vmdk_snap.errors import InvalidRequest
from qemu_vmdk_snap.storage.blockfile import BlockFile, PosixFile
from qemu_vmdk_snap.storage.durable import NewFiles
from qemu_vmdk_snap.storage.limits import allow_open_files
from qemu_vmdk_snap.units import SECTOR_SIZE, sector_bytes
from qemu_vmdk_snap.vmdk.cowd_layout import CowdLayout, plan_cowd, write_cowd
from qemu_vmdk_snap.vmdk.descriptor import NO_PARENT, make_descriptor
from qemu_vmdk_snap.vmdk.sparse_layout import SparseLayout, plan_sparse, write_sparse

if TYPE_CHECKING:
    from qemu_vmdk_snap.vmdk.bulk import BulkWriter

DEFAULT_GRAIN: Final = 64 << 10
SPLIT_SECTORS: Final = 4192256
"""2047 MiB, as the technote and VirtualBox split; QEMU's 2 GiB is a byte more than some file systems take."""

_MAX_PARTS: Final = 4096


class Kind(NamedTuple):
    """One kind of image that can be made."""

    create_type: str
    """What its descriptor says: QEMU 7.2 knows ESXi's flat disks by `vmfs` alone."""
    extent_type: str
    suffix: str
    """Put before `.vmdk` in the names of its extents; empty where the descriptor is inside."""
    may_have_parent: bool
    split: bool = False
    stream: bool = False


KINDS: Final[Mapping[str, Kind]] = {
    "monolithicSparse": Kind("monolithicSparse", "SPARSE", "", True),
    "monolithicFlat": Kind("monolithicFlat", "FLAT", "-flat", False),
    "twoGbMaxExtentSparse": Kind("twoGbMaxExtentSparse", "SPARSE", "-s{:03}", True, split=True),
    "twoGbMaxExtentFlat": Kind("twoGbMaxExtentFlat", "FLAT", "-f{:03}", False, split=True),
    "streamOptimized": Kind("streamOptimized", "SPARSE", "", False, stream=True),
    "vmfs": Kind("vmfs", "VMFS", "-flat", False),
    "vmfsThin": Kind("vmfs", "VMFS", "-flat", False),
    "vmfsSparse": Kind("vmfsSparse", "VMFSSPARSE", "-delta", True),
}


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """What a new image is like; the names are those of qemu-img's `-o`."""

    grain_size: int = DEFAULT_GRAIN
    """Bytes that are allocated at once: a power of two from 4 KiB to 1 GiB. vmfsSparse always has 512."""
    adapter_type: str = "ide"
    hwversion: str = "4"
    toolsversion: str | None = None
    zeroed_grain: bool = False
    """Let a grain be marked as zeros (version 2): over a parent's data too, and without storing it."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Further `ddb.` entries, keys without the prefix."""
    subformat: str = "monolithicSparse"
    """The kind: one of `KINDS`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The files of a new image: extents by name, sectors and layout (None: flat), and the descriptor."""

    kind: Kind
    options: ImageOptions
    extents: tuple[tuple[str, int, SparseLayout | CowdLayout | None], ...]
    descriptor: bytes
    sectors: int


def kind_of(path: Path, options: ImageOptions) -> Kind:
    """Return the kind that the options name.

    Raises:
        InvalidRequest: there is none of that name that can be made.
    """
    kind = KINDS.get(options.subformat)
    if kind is None:
        known = ", ".join(KINDS)
        raise InvalidRequest(path, f"subformat {options.subformat!r} is not one of those that can be made: {known}")
    return kind


def plan_image(
    path: Path,
    name: str,
    sectors: int,
    options: ImageOptions,
    *,
    cid: int,
    parent_cid: int,
    hint: str | None,
    ddb: Mapping[str, str],
) -> Plan:
    """Return what a new image consists of; `name` is what its descriptor file will be called.

    Raises:
        InvalidRequest: the kind cannot have a parent, or the name cannot be written in a descriptor.
        Unsupported: the kind cannot hold so much.
    """
    kind = kind_of(path, options)
    if parent_cid != NO_PARENT and not kind.may_have_parent:
        raise InvalidRequest(path, f"an image of kind {options.subformat} cannot have a parent")
    lines: list[tuple[str, int, str, str | None, int | None]] = []
    extents: list[tuple[str, int, SparseLayout | CowdLayout | None]] = []
    for part, length in enumerate(_part_sizes(path, sectors, kind), 1):
        file = _extent_name(name, kind.suffix.format(part))
        lines.append(("RW", length, kind.extent_type, file, 0 if kind.extent_type == "FLAT" else None))
        extents.append((file, length, _plan_extent(path, kind, length, options, ddb)))
    text = make_descriptor(
        cid=cid,
        parent_cid=parent_cid,
        create_type=kind.create_type,
        hint=hint,
        extents=lines,
        ddb=ddb,
        path=path,
    )
    if not kind.suffix and not kind.stream:
        layout = _plan_sparse(sectors, options, text)
        extents = [(name, sectors, layout)]
    return Plan(kind, options, tuple(extents), text, sectors)


def write_image(files: NewFiles, path: Path, plan: Plan, mode: int = 0o666) -> list[tuple[PosixFile, int]]:
    """Add the files of an empty image to `files`; return those that hold the extents, with their sectors.

    Raises:
        FileExistsError: something bears the name of one of them; it is untouched.
    """
    if not plan.kind.suffix:
        file = files.add(path, mode)
        layout = plan.extents[0][2]
        if isinstance(layout, SparseLayout):
            write_sparse(file, layout, plan.descriptor)
        return [(file, plan.sectors)]
    made: list[tuple[PosixFile, int]] = []
    allow_open_files(len(plan.extents))
    for name, sectors, layout in plan.extents:
        file = files.add(path.with_name(name), mode)
        if isinstance(layout, SparseLayout):
            write_sparse(file, layout, None)
        elif isinstance(layout, CowdLayout):
            write_cowd(file, layout)
        else:
            file.truncate(sector_bytes(sectors))
            if plan.options.subformat == "vmfs":
                os.posix_fallocate(file.fileno(), 0, sector_bytes(sectors))
        made.append((file, sectors))
    files.add(path, mode).write_at(0, plan.descriptor)
    return made


def extent_files(path: Path) -> list[Path]:
    """Return the files that lie beside an image's descriptor and hold its extents; none where it is embedded."""
    file = PosixFile.open(path)
    try:
        descriptor, embedded = read_descriptor(file)
    finally:
        file.close()
    return [] if embedded else [path.with_name(line.file) for line in descriptor.extents if line.file is not None]


def bulk_writer(path: Path, plan: Plan, files: list[tuple[PosixFile, int]]) -> BulkWriter:
    """Return the writer that fills the image whose empty files `write_image` has made."""
    from qemu_vmdk_snap.vmdk.bulk import BulkParts  # NumPy: not needed to make an empty image

    if plan.kind.stream:
        return stream_writer(path, plan, _appending(files[0][0]))
    layouts = [layout for _, _, layout in plan.extents]
    parts = [
        (sector_bytes(sectors), _extent_writer(file, sectors, layout))
        for (file, sectors), layout in zip(files, layouts, strict=True)
    ]
    return parts[0][1] if len(parts) == 1 else BulkParts(parts)


def stream_writer(path: Path, plan: Plan, write: Callable[[bytes], object]) -> BulkWriter:
    """Return the writer of a streamOptimized image that hands its bytes, front to end, to `write`."""
    from qemu_vmdk_snap.vmdk.stream_writer import BulkStream, StreamWriter

    grain = plan.options.grain_size // SECTOR_SIZE
    return BulkStream(StreamWriter(write, plan.sectors, plan.descriptor, path, grain_sectors=grain))


def _appending(file: BlockFile) -> Callable[[bytes], None]:
    position = 0

    def write(data: bytes) -> None:
        nonlocal position
        file.write_at(position, data)
        position += len(data)

    return write


def _extent_writer(file: BlockFile, sectors: int, layout: SparseLayout | CowdLayout | None) -> BulkWriter:
    from qemu_vmdk_snap.vmdk.bulk import BulkCowd, BulkFlat, BulkSparse

    if isinstance(layout, SparseLayout):
        return BulkSparse(file, layout)
    if isinstance(layout, CowdLayout):
        return BulkCowd(file, layout)
    return BulkFlat(file, sector_bytes(sectors))


def _part_sizes(path: Path, sectors: int, kind: Kind) -> list[int]:
    if not kind.split:
        return [sectors]
    count = -(-sectors // SPLIT_SECTORS)
    if count > _MAX_PARTS:
        raise InvalidRequest(path, f"would need {count} extents: more than {_MAX_PARTS}; choose another kind")
    return [SPLIT_SECTORS] * (count - 1) + [sectors - (count - 1) * SPLIT_SECTORS]


def _extent_name(name: str, suffix: str) -> str:
    stem = name[: -len(".vmdk")] if name.lower().endswith(".vmdk") else name
    return f"{stem}{suffix}.vmdk" if suffix else name


def _plan_extent(
    path: Path, kind: Kind, sectors: int, options: ImageOptions, ddb: Mapping[str, str]
) -> SparseLayout | CowdLayout | None:
    if kind.extent_type == "VMFSSPARSE":
        words = [ddb.get(f"geometry.{name}", "") for name in ("cylinders", "heads", "sectors")]
        cylinders, heads, track = (int(word) if word.isdigit() and len(word) < 10 else 0 for word in words)
        return plan_cowd(sectors, path, geometry=(cylinders, heads, track))
    if kind.extent_type == "SPARSE" and kind.suffix:
        return _plan_sparse(sectors, options, None)
    return None


def _plan_sparse(sectors: int, options: ImageOptions, descriptor: bytes | None) -> SparseLayout:
    grain = options.grain_size // SECTOR_SIZE
    return plan_sparse(sectors, grain_sectors=grain, zeroed_grains=options.zeroed_grain, descriptor=descriptor)
