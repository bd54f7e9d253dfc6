"""Has anybody written an image since the operation on it was interrupted?

QEMU and other tools know nothing of intent records: a guest may have run on an image before `recover` does. Finishing
the operation then would take away what the guest wrote. Every writer renews the CID of what it opens, so the CIDs at
the beginning are recorded, and one that is neither of these nor one that the operation itself sets stops the recovery.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from qemu_vmdk_snap.chain.link import read_descriptor
from qemu_vmdk_snap.errors import CorruptChain, VmdkSnapError
from qemu_vmdk_snap.storage.blockfile import PosixFile
from qemu_vmdk_snap.storage.intent import Intent, from_text, make_intent
from qemu_vmdk_snap.vmdk.descriptor import Descriptor

_KEY: Final = "cids"


class WrittenMeanwhile(CorruptChain):
    """An image was written after the operation on it was interrupted: only its owner can say what is to be kept."""


def guarded_intent(operation: str, image: Path, images: Iterable[Path], details: Mapping[str, Any]) -> Intent:
    """Return the intent of an operation, with the CIDs that its images have now."""
    intent = make_intent(operation, image, images, {})
    cids = {str(path): cid for path in intent.images if (cid := _cid_of(path)) is not None}
    return replace(intent, details={**details, _KEY: cids})


def check_unwritten(intent: Intent) -> None:
    """Return if nobody else has written an image of the operation since it began.

    Raises:
        WrittenMeanwhile: somebody has; nothing was changed.
    """
    own = list(_own_cids(intent.details))
    for name, cid in intent.details.get(_KEY, {}).items():
        path = Path(name)
        now = _cid_of(path)
        if now is None or now == cid or (path, now) in own:
            continue
        reason = (
            f"was written (CID {now:08x}, not {cid:08x}) after a {intent.operation} was interrupted, and to finish "
            f"that could lose what was written: remove {intent.path} to keep the images as they are"
        )
        raise WrittenMeanwhile(path, reason)


def _own_cids(details: Mapping[str, Any]) -> Iterator[tuple[Path, int]]:
    """Yield the CIDs that the operation itself sets, from the changes of descriptors in its record."""
    for value in details.values():
        for change in value if isinstance(value, list) else [value]:
            if isinstance(change, dict) and {"path", "new"} <= change.keys():
                path = Path(change["path"])
                with contextlib.suppress(VmdkSnapError):
                    yield path, Descriptor.parse(from_text(change["new"]), path=path).cid


def _cid_of(path: Path) -> int | None:
    """Return the CID of an image, None where there is none to read: a file that is gone, or an extent's."""
    with contextlib.suppress(OSError, VmdkSnapError):
        file = PosixFile.open(path)
        try:
            return read_descriptor(file)[0].cid
        finally:
            file.close()
    return None
