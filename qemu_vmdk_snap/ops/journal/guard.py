"""Finds images that were written since the operation on them was interrupted.

QEMU and other tools know nothing of operation records: a guest may have run on an image before `recover` does.
Finishing the operation then would lose what the guest wrote. Every writer renews the CID of what it opens, so the
CIDs at the beginning are recorded, and a CID that is neither one of these nor one that the operation sets stops the
recovery.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from qemu_vmdk_snap.chain.link import read_descriptor
from qemu_vmdk_snap.errors import CorruptChain, VmdkSnapError
from qemu_vmdk_snap.light import replace
from qemu_vmdk_snap.storage.blockfile import PosixFile
from qemu_vmdk_snap.storage.record import Operation, from_text, make_operation
from qemu_vmdk_snap.vmdk.descriptor import Descriptor

_KEY: Final = "cids"


class WrittenMeanwhile(CorruptChain):
    """An image was written after the operation on it was interrupted: the user must decide what to keep."""


def guarded_operation(name: str, image: Path, images: Iterable[Path], details: Mapping[str, Any]) -> Operation:
    """Return the record of an operation, with the CIDs that its images have now."""
    operation = make_operation(name, image, images, {})
    cids = [[path, cid] for path in operation.images if (cid := _cid_of(path)) is not None]
    return replace(operation, details={**details, _KEY: cids})


def folders_of(operation: Operation) -> list[Path]:
    """Return the folders of every file that the operation names: nothing else is opened to finish it."""
    return sorted({path.parent for path in (*operation.images, *_paths_in(operation.details))})


def _paths_in(value: object) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _paths_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _paths_in(one)


def check_unwritten(operation: Operation) -> None:
    """Require that nobody else has written an image of the operation since it began.

    Raises:
        WrittenMeanwhile: one was written; nothing was changed.
    """
    own = list(_own_cids(operation.details))
    for path, cid in operation.details.get(_KEY, ()):
        now = _cid_of(path)
        if now is None or now == cid or (path, now) in own:
            continue
        reason = (
            f"was written (CID {now:08x}, not {cid:08x}) after a {operation.name} was interrupted, and finishing "
            f"that could lose what was written: `recover --abandon {path.parent}` keeps the images as they are"
        )
        raise WrittenMeanwhile(path, reason)


def _own_cids(details: Mapping[str, Any]) -> Iterator[tuple[Path, int]]:
    """Yield the CIDs that the operation itself sets, from the changes of descriptors in its record."""
    for value in details.values():
        for change in value if isinstance(value, list | tuple) else [value]:
            if isinstance(change, dict) and {"path", "new"} <= change.keys():
                path = Path(change["path"])
                with contextlib.suppress(VmdkSnapError):
                    yield path, Descriptor.parse(from_text(change["new"]), path=path).cid


def _cid_of(path: Path) -> int | None:
    """Return the CID of an image, None if it has none: the file is gone, or an extent."""
    with contextlib.suppress(OSError, VmdkSnapError):
        file = PosixFile.open(path)
        try:
            return read_descriptor(file)[0].cid
        finally:
            file.close()
    return None
