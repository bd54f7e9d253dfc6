"""Snapshots of VMDK disks under QEMU and libvirt, proven by booting a guest on them.

    from qemu_vmdk_snap import create_image, create_overlay, open_chain

The names below are imported when they are first used, so that importing the package costs nothing. They are all that
the plugins and the harness use of the engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from qemu_vmdk_snap.chain.chain import Chain, Run, RunKind, WritableChain, open_chain
    from qemu_vmdk_snap.chain.disk import RawDisk
    from qemu_vmdk_snap.chain.link import Link, open_link, read_descriptor
    from qemu_vmdk_snap.chain.links import LinkFacts, read_facts, read_links
    from qemu_vmdk_snap.chain.needs.dependents import Census, Dependent, children_of, require_fit
    from qemu_vmdk_snap.chain.needs.follow import Followed, follow
    from qemu_vmdk_snap.chain.needs.own import own_files
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
        StillNeeded,
        Unsupported,
        VmdkSnapError,
    )
    from qemu_vmdk_snap.ops.check.check import check_image
    from qemu_vmdk_snap.ops.check.repair import repair
    from qemu_vmdk_snap.ops.copy.compare import compare
    from qemu_vmdk_snap.ops.copy.convert import convert
    from qemu_vmdk_snap.ops.copy.diff import changes, make_delta
    from qemu_vmdk_snap.ops.copy.measure import measure
    from qemu_vmdk_snap.ops.edit.apply import apply_delta
    from qemu_vmdk_snap.ops.edit.commit import commit
    from qemu_vmdk_snap.ops.edit.compact import compact
    from qemu_vmdk_snap.ops.edit.rebase import rebase
    from qemu_vmdk_snap.ops.edit.remove import remove
    from qemu_vmdk_snap.ops.edit.renew import renew_overlay
    from qemu_vmdk_snap.ops.edit.resize import resize
    from qemu_vmdk_snap.ops.info import chain_info, image_info
    from qemu_vmdk_snap.ops.journal.recover import recover
    from qemu_vmdk_snap.ops.make.create import ImageOptions, create_image, create_overlay
    from qemu_vmdk_snap.ops.needed import require_writable
    from qemu_vmdk_snap.ops.progress import OnProgress, Progress, ignore
    from qemu_vmdk_snap.storage.attributes import copy_attributes
    from qemu_vmdk_snap.storage.blockfile import PosixFile, open_posix
    from qemu_vmdk_snap.storage.durable import replace_file
    from qemu_vmdk_snap.storage.identity import Identity, identity_of
    from qemu_vmdk_snap.vmdk.descriptor import Descriptor
    from qemu_vmdk_snap.vmdk.runs import HOLE

__version__ = "0.1.0"

__all__ = [
    "HOLE",
    "Census",
    "Chain",
    "CidMismatch",
    "CorruptChain",
    "Dependent",
    "Descriptor",
    "DomainError",
    "Followed",
    "FormatError",
    "GuestError",
    "Identity",
    "ImageOptions",
    "InvalidRequest",
    "Link",
    "LinkFacts",
    "LockBusy",
    "OnProgress",
    "PluginError",
    "PosixFile",
    "Progress",
    "RawDisk",
    "Run",
    "RunKind",
    "StillNeeded",
    "Unsupported",
    "VmdkSnapError",
    "WritableChain",
    "apply_delta",
    "chain_info",
    "changes",
    "check_image",
    "children_of",
    "commit",
    "compact",
    "compare",
    "confined",
    "convert",
    "copy_attributes",
    "create_image",
    "create_overlay",
    "follow",
    "identity_of",
    "ignore",
    "image_info",
    "make_delta",
    "measure",
    "open_chain",
    "open_link",
    "open_posix",
    "own_files",
    "read_descriptor",
    "read_facts",
    "read_links",
    "rebase",
    "recover",
    "remove",
    "renew_overlay",
    "repair",
    "replace_file",
    "require_fit",
    "require_writable",
    "resize",
]

_HOMES: Final = {
    "open_chain": "chain.chain",
    "Chain": "chain.chain",
    "WritableChain": "chain.chain",
    "Run": "chain.chain",
    "RunKind": "chain.chain",
    "Census": "chain.needs.dependents",
    "Dependent": "chain.needs.dependents",
    "children_of": "chain.needs.dependents",
    "require_fit": "chain.needs.dependents",
    "RawDisk": "chain.disk",
    "Followed": "chain.needs.follow",
    "follow": "chain.needs.follow",
    "Link": "chain.link",
    "open_link": "chain.link",
    "read_descriptor": "chain.link",
    "LinkFacts": "chain.links",
    "read_facts": "chain.links",
    "read_links": "chain.links",
    "own_files": "chain.needs.own",
    "confined": "chain.resolver",
    "apply_delta": "ops.edit.apply",
    "check_image": "ops.check.check",
    "commit": "ops.edit.commit",
    "compact": "ops.edit.compact",
    "compare": "ops.copy.compare",
    "convert": "ops.copy.convert",
    "ImageOptions": "ops.make.create",
    "create_image": "ops.make.create",
    "create_overlay": "ops.make.create",
    "changes": "ops.copy.diff",
    "make_delta": "ops.copy.diff",
    "chain_info": "ops.info",
    "image_info": "ops.info",
    "measure": "ops.copy.measure",
    "require_writable": "ops.needed",
    "OnProgress": "ops.progress",
    "Progress": "ops.progress",
    "ignore": "ops.progress",
    "rebase": "ops.edit.rebase",
    "recover": "ops.journal.recover",
    "remove": "ops.edit.remove",
    "renew_overlay": "ops.edit.renew",
    "repair": "ops.check.repair",
    "resize": "ops.edit.resize",
    "copy_attributes": "storage.attributes",
    "PosixFile": "storage.blockfile",
    "open_posix": "storage.blockfile",
    "replace_file": "storage.durable",
    "Identity": "storage.identity",
    "identity_of": "storage.identity",
    "Descriptor": "vmdk.descriptor",
    "HOLE": "vmdk.runs",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
