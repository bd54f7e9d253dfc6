"""Snapshots of VMDK disks under QEMU and libvirt, proven by booting a guest on them.

    from qemu_vmdk_snap import create_image, create_overlay, open_chain

The names below are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from qemu_vmdk_snap.chain.chain import Chain, Run, RunKind, WritableChain, open_chain
    from qemu_vmdk_snap.chain.links import LinkFacts, read_facts, read_links
    from qemu_vmdk_snap.chain.resolver import confined
    from qemu_vmdk_snap.errors import (
        CidMismatch,
        CorruptChain,
        DomainError,
        FormatError,
        GuestError,
        InvalidRequest,
        LockBusy,
        PluginError,
        Unsupported,
        VmdkSnapError,
    )
    from qemu_vmdk_snap.ops.check import check_image
    from qemu_vmdk_snap.ops.create import ImageOptions, create_image, create_overlay
    from qemu_vmdk_snap.ops.renew import renew_overlay
    from qemu_vmdk_snap.storage.durable import replace_file

__version__ = "0.1.0"

__all__ = [
    "Chain",
    "CidMismatch",
    "CorruptChain",
    "DomainError",
    "FormatError",
    "GuestError",
    "ImageOptions",
    "InvalidRequest",
    "LinkFacts",
    "LockBusy",
    "PluginError",
    "Run",
    "RunKind",
    "Unsupported",
    "VmdkSnapError",
    "WritableChain",
    "check_image",
    "confined",
    "create_image",
    "create_overlay",
    "open_chain",
    "read_facts",
    "read_links",
    "renew_overlay",
    "replace_file",
]

_HOMES: Final = {
    "open_chain": "chain.chain",
    "Chain": "chain.chain",
    "WritableChain": "chain.chain",
    "Run": "chain.chain",
    "RunKind": "chain.chain",
    "create_image": "ops.create",
    "create_overlay": "ops.create",
    "ImageOptions": "ops.create",
    "check_image": "ops.check",
    "renew_overlay": "ops.renew",
    "LinkFacts": "chain.links",
    "read_facts": "chain.links",
    "read_links": "chain.links",
    "confined": "chain.resolver",
    "replace_file": "storage.durable",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
