"""No guest is booted on a chain of which a link was written after the overlay on it was made."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qemu_vmdk_snap import read_links
from qemu_vmdk_snap.errors import CidMismatch, VmdkSnapError


def refuse_stale(images: Iterable[Path]) -> None:
    """Compare the CIDs of each VMDK's chain, wherever its links are, as far as it can be followed.

    What else is wrong with an image, or that it is none, is QEMU's to say.

    Raises:
        CidMismatch: a parent was written after its overlay was made.
    """
    for image in images:
        try:
            read_links(image, trusted_dirs=["/"])
        except CidMismatch:
            raise
        except (VmdkSnapError, OSError):
            continue
