"""The kinds of image that can be created, and the files of each.

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

from collections.abc import Callable, Mapping
from pathlib import Path

from qemu_vmdk_snap.chain.link import read_descriptor
from qemu_vmdk_snap.errors import InvalidRequest
from qemu_vmdk_snap.light import TYPE_CHECKING, Final, NamedTuple, dataclass, field
from qemu_vmdk_snap.storage.blockfile import PosixFile
from qemu_vmdk_snap.storage.durable import NewFiles
from qemu_vmdk_snap.storage.limits import allow_open_files
from qemu_vmdk_snap.units import SECTOR_SIZE, sector_bytes
from qemu_vmdk_snap.vmdk.descriptor import NO_PARENT, make_descriptor
from qemu_vmdk_snap.vmdk.grain.new_extent import ExtentLayout, Wanted, plan_extent
from qemu_vmdk_snap.vmdk.stream.layout import StreamLayout

if TYPE_CHECKING:
    from qemu_vmdk_snap.vmdk.grain.bulk import BulkWriter

DEFAULT_GRAIN: Final = 64 << 10
SPLIT_SECTORS: Final = 4192256
"""2047 MiB, as the technote and VirtualBox split; QEMU's 2 GiB is a byte more than some file systems take."""

_MAX_PARTS: Final = 4096


class Kind(NamedTuple):
    """One kind of image that can be created."""

    create_type: str
    """The `createType` of its descriptor: QEMU 7.2 knows ESXi's flat disks only as `vmfs`."""
    extent_type: str
    layout: str
    """The module of `vmdk` whose `plan_extent` plans its extents."""
    suffix: str
    """Put before `.vmdk` in the names of its extents; empty where the descriptor is inside."""
    may_have_parent: bool = False
    split: bool = False
    stream: bool = False
    """Whether it is written from start to end, and so may be written to a pipe."""
    reserve: bool = False
    ddb: tuple[tuple[str, str], ...] = ()
    """Its `ddb.` entries, unless an option replaces them."""


_TOOLS_UNKNOWN: Final = ("toolsVersion", "2147483647")
"""ESXi's import requires these entries."""

KINDS: Final[Mapping[str, Kind]] = {
    "monolithicSparse": Kind("monolithicSparse", "SPARSE", "sparse.layout", "", may_have_parent=True),
    "monolithicFlat": Kind("monolithicFlat", "FLAT", "flat.layout", "-flat"),
    "twoGbMaxExtentSparse": Kind(
        "twoGbMaxExtentSparse", "SPARSE", "sparse.layout", "-s{:03}", may_have_parent=True, split=True
    ),
    "twoGbMaxExtentFlat": Kind("twoGbMaxExtentFlat", "FLAT", "flat.layout", "-f{:03}", split=True),
    "streamOptimized": Kind("streamOptimized", "SPARSE", "stream.layout", "", stream=True, ddb=(_TOOLS_UNKNOWN,)),
    "vmfs": Kind("vmfs", "VMFS", "flat.layout", "-flat", reserve=True),
    "vmfsThin": Kind("vmfs", "VMFS", "flat.layout", "-flat", ddb=(("thinProvisioned", "1"),)),
    "vmfsSparse": Kind("vmfsSparse", "VMFSSPARSE", "cowd.layout", "-delta", may_have_parent=True),
}


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """The options of a new image; the names are those of qemu-img's `-o`."""

    grain_size: int = DEFAULT_GRAIN
    """Bytes that are allocated at once: a power of two from 4 KiB to 1 GiB. vmfsSparse always has 512."""
    adapter_type: str = "ide"
    hwversion: str = "4"
    toolsversion: str | None = None
    zeroed_grain: bool = False
    """Allow grains to be marked as zeros (version 2): over a parent's data too, without storing them."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Further `ddb.` entries, keys without the prefix."""
    subformat: str = "monolithicSparse"
    """The kind: one of `KINDS`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The files of a new image: extents by name, sectors and layout, and the descriptor."""

    kind: Kind
    options: ImageOptions
    extents: tuple[tuple[str, int, ExtentLayout], ...]
    descriptor: bytes
    sectors: int


def kind_for(path: Path, options: ImageOptions) -> Kind:
    """Return the kind that the options name.

    Raises:
        InvalidRequest: there is no such kind that can be created.
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
    """Return the plan of a new image; `name` is the name that its descriptor file will have.

    Raises:
        InvalidRequest: the kind cannot have a parent, or the name cannot be written in a descriptor.
        Unsupported: the size exceeds what the kind can store.
    """
    kind = kind_for(path, options)
    if parent_cid != NO_PARENT and not kind.may_have_parent:
        raise InvalidRequest(path, f"an image of kind {options.subformat} cannot have a parent")
    parts = [
        (_extent_name(name, kind.suffix.format(part)), length)
        for part, length in enumerate(_part_sizes(path, sectors, kind), 1)
    ]
    at = 0 if kind.extent_type == "FLAT" else None
    text = make_descriptor(
        cid=cid,
        parent_cid=parent_cid,
        create_type=kind.create_type,
        hint=hint,
        extents=[("RW", length, kind.extent_type, file, at) for file, length in parts],
        ddb=ddb,
        path=path,
    )
    extents = [(file, length, _plan_extent(path, kind, length, options, ddb, text)) for file, length in parts]
    return Plan(kind, options, tuple(extents), text, sectors)


def write_image(files: NewFiles, path: Path, plan: Plan, mode: int = 0o666) -> list[tuple[PosixFile, int]]:
    """Add the files of an empty image to `files`; return those of the extents, with their sectors.

    Raises:
        FileExistsError: one of the names exists; that file is not changed.
    """
    made: list[tuple[PosixFile, int]] = []
    allow_open_files(len(plan.extents))
    for name, sectors, layout in plan.extents:
        file = files.add(path.with_name(name) if plan.kind.suffix else path, mode)
        layout.create(file)
        made.append((file, sectors))
    if plan.kind.suffix:
        files.add(path, mode).write_at(0, plan.descriptor)
    return made


def extent_files(path: Path) -> list[Path]:
    """Return the files of an image's extents besides its descriptor file; none where that is embedded."""
    file = PosixFile.open(path)
    try:
        descriptor, embedded = read_descriptor(file)
    finally:
        file.close()
    return [] if embedded else [path.with_name(line.file) for line in descriptor.extents if line.file is not None]


def bulk_writer(plan: Plan, files: list[tuple[PosixFile, int]]) -> BulkWriter:
    """Return the writer that fills the image whose empty files `write_image` has made."""
    from qemu_vmdk_snap.vmdk.grain.bulk import BulkParts  # NumPy: not needed to make an empty image

    parts = [
        (sector_bytes(sectors), layout.writer(file))
        for (file, sectors), (_, _, layout) in zip(files, plan.extents, strict=True)
    ]
    return parts[0][1] if len(parts) == 1 else BulkParts(parts)


def stream_writer(plan: Plan, write: Callable[[bytes], object]) -> BulkWriter:
    """Return the writer of a streamOptimized image that passes its bytes, from start to end, to `write`."""
    layout = plan.extents[0][2]
    assert isinstance(layout, StreamLayout)
    return layout.stream(write)


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
    path: Path, kind: Kind, sectors: int, options: ImageOptions, ddb: Mapping[str, str], text: bytes
) -> ExtentLayout:
    words = [ddb.get(f"geometry.{name}", "") for name in ("cylinders", "heads", "sectors")]
    cylinders, heads, track = (int(word) if word.isdigit() and len(word) < 10 else 0 for word in words)
    wanted = Wanted(
        path,
        sectors,
        options.grain_size // SECTOR_SIZE,
        options.zeroed_grain,
        (cylinders, heads, track),
        None if kind.suffix else text,
        kind.reserve,
    )
    return plan_extent(f"qemu_vmdk_snap.vmdk.{kind.layout}", wanted)
