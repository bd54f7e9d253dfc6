"""Make one image of several neighbouring links of a chain, beside them: they are read, and stay as they are.

    chain:   C -> U -> M -> L -> B         merge_links(U, L, image)
    beside:            image -> B          reads what U reads, and has U's CID, so that C fits it as it fits U

For links that others have open and that therefore cannot be changed in place. Whoever put the image under U's name
would find every overlay on U, and every reader of it, undisturbed. If it is killed, no file has the image's name.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from qemu_vmdk_snap import log
from qemu_vmdk_snap.chain.chain import Chain, open_chain, open_links
from qemu_vmdk_snap.chain.identity import hint_to
from qemu_vmdk_snap.chain.resolver import Resolver, confined
from qemu_vmdk_snap.errors import CorruptChain, InvalidRequest
from qemu_vmdk_snap.ops.copy.compare import compare
from qemu_vmdk_snap.ops.copy.transfer import LinkWriter, View, upper_tables
from qemu_vmdk_snap.ops.make.create import inherited_options
from qemu_vmdk_snap.ops.make.layout import ImageOptions, plan_image, write_image
from qemu_vmdk_snap.ops.progress import Meter, OnProgress, ignore
from qemu_vmdk_snap.storage.durable import NewFiles, publish, temporary_name, working_in
from qemu_vmdk_snap.units import byte_sectors
from qemu_vmdk_snap.vmdk.descriptor import NO_PARENT, Descriptor
from qemu_vmdk_snap.vmdk.runs import HOLE, ZERO

OPERATION: Final = "merge"
_DDB: Final = re.compile(rb"^[ \t]*ddb\.([A-Za-z_][\w.\-]*)[ \t]*=", re.MULTILINE | re.IGNORECASE)
_log = log.of(__name__)


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge made."""

    path: Path
    cid: int
    parent: Path | None
    """What the image is backed by; None where it is a base."""
    stored: int
    """Guest bytes that it stores."""

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types."""
        parent = None if self.parent is None else str(self.parent)
        return {"filename": str(self.path), "cid": self.cid, "parent": parent, "data-bytes": self.stored}


def merge_links(
    path: Path | str,
    lowest: Path | str,
    image: Path | str,
    *,
    trusted_dirs: Sequence[Path | str] = (),
    resolver: Resolver | None = None,
    durable: bool = True,
    mode: int = 0o666,
    on_progress: OnProgress = ignore,
) -> MergeReport:
    """Make `image` of the links from `path` down to `lowest`: it reads as `path`, has its CID, and needs none of these.

    It is backed by what `lowest` is backed by. The links may be open in a running guest, for reading: they are locked
    as readers lock them. The image is of the kind monolithicSparse; it is compared with `path` before it gets its name,
    and durable when this returns. After a failure, or a callback that raises, no file is left.

    Raises:
        InvalidRequest: `lowest` is not in the chain of `path`.
        FileExistsError: the image's name exists; that file is not changed.
        CorruptChain: the image would not read as `path` does; and all that `open_chain` raises.
        OSError: the system refused (no space, I/O error).
    """
    path, image = Path(path), Path(image)
    if os.path.lexists(image):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(image))
    find = resolver or confined([path.parent, *trusted_dirs])
    with open_chain(path, resolver=find) as chain:
        count = _count(chain, Path(lowest))
        temporary = temporary_name(image)
        with working_in(image.parent):
            try:
                _make_empty(chain, count, temporary, image, mode)
                stored = _fill(chain, count, temporary, find, on_progress)
                _require_same(chain, temporary, image, find, on_progress)
                publish(temporary, image, durable=durable)
            finally:
                temporary.unlink(missing_ok=True)
        parent = chain.links[count].path if count < chain.depth else None
        _log.info("%s: made of %d links below and with %s", image, count, path)
        return MergeReport(image, chain.links[0].cid, parent, stored)


def _count(chain: Chain, lowest: Path) -> int:
    real = lowest.resolve()
    found = next((depth for depth, link in enumerate(chain.links) if link.path.resolve() == real), None)
    if found is None:
        raise InvalidRequest(chain.path, f"{lowest} is not in its backing chain")
    return found + 1


def _make_empty(chain: Chain, count: int, temporary: Path, image: Path, mode: int) -> None:
    """Make the image without data: it has the top's CID and disk database, and the parent of the lowest link."""
    top, lowest = chain.links[0], chain.links[count - 1]
    below = chain.links[count] if count < chain.depth else None
    ddb = _database(lowest.descriptor) if below is None else {}
    plan = plan_image(
        temporary,
        image.name,
        byte_sectors(top.capacity),
        _options(chain, count),
        cid=top.cid,
        parent_cid=NO_PARENT if below is None else below.cid,
        hint=None if below is None else hint_to(image, below.path),
        ddb=ddb | _database(top.descriptor),
    )
    with NewFiles(durable=False) as files:
        write_image(files, temporary, plan, mode)


def _options(chain: Chain, count: int) -> ImageOptions:
    """Return those of the top; zeros can be marked where one of the links has such marks."""
    merged = [inherited_options(link.path) for link in chain.links[:count]]
    zeroed = any(one.zeroed_grain for one in merged)
    return replace(merged[0], zeroed_grain=zeroed, subformat="monolithicSparse")


def _database(descriptor: Descriptor) -> dict[str, str]:
    """Return the entries of a descriptor's disk database, keys without their prefix."""
    keys = [found.decode("ascii") for found in _DDB.findall(descriptor.raw)]
    return {key: value for key in keys if (value := descriptor.get(f"ddb.{key}")) is not None}


def _fill(chain: Chain, count: int, temporary: Path, find: Resolver, on_progress: OnProgress) -> int:
    stored = 0
    meter = Meter(OPERATION, chain.capacity, on_progress)
    with open_links(temporary, writable_depths=[0], resolver=find) as target:
        writer = LinkWriter(target.links[0], View(chain, count), meter.step)
        for table in upper_tables(chain, count, 0, chain.capacity):
            rows = table.rows()
            writer.put_rows(rows, chain)
            stored += sum(row.length for row in rows if row.kind not in (HOLE, ZERO))
            meter.reach(table.end)
        writer.finish()
    return stored


def _require_same(chain: Chain, temporary: Path, image: Path, find: Resolver, on_progress: OnProgress) -> None:
    with open_chain(temporary, resolver=find) as made:
        result = compare(chain, made, blocks=True, on_progress=on_progress)
    if not result.identical or result.sizes is not None:
        where = f" at byte {result.offset}" if result.offset is not None else ""
        raise CorruptChain(image, f"would not read as {chain.path} does{where}: it is not kept")
