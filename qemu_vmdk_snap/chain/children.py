"""The way up: which images name a given one as their parent. The format links downwards only: folders are searched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from qemu_vmdk_snap.chain.link import read_descriptor
from qemu_vmdk_snap.chain.resolver import Resolver
from qemu_vmdk_snap.errors import CorruptChain, FormatError, InvalidRequest, Unsupported
from qemu_vmdk_snap.storage.blockfile import PosixFile
from qemu_vmdk_snap.vmdk.descriptor import Descriptor

_TEMPORARY: Final = (".tmp", ".intent", ".new")


class Child(NamedTuple):
    """An image that names the parent in question."""

    path: Path
    parent_cid: int


def find_children(parent: Path, cid: int, folders: Iterable[Path], resolver: Resolver) -> list[Child]:
    """Return the images in `folders` that name `parent` as theirs and fit its `cid`, by name.

    One whose parentCID does not fit cannot be read any more, whatever happens to the parent. Temporary files are passed
    over.

    Raises:
        InvalidRequest: an image cannot be looked at, and so may be a child.
    """
    real = parent.resolve()
    found: dict[Path, Child] = {}
    for folder in {folder.resolve() for folder in folders}:
        for path in sorted(folder.iterdir()):
            if path.name.endswith(_TEMPORARY) or not path.is_file() or path.resolve() == real:
                continue
            child = _as_child(path, real, resolver)
            if child is not None and child.parent_cid == cid:
                found.setdefault(path.resolve(), child)
    return list(found.values())


def _as_child(path: Path, parent: Path, resolver: Resolver) -> Child | None:
    descriptor = _descriptor_of(path)
    with contextlib.suppress(FormatError, CorruptChain):
        if descriptor is not None and descriptor.parent_hint is not None:
            named = resolver(path, descriptor.parent_hint, "parent")
            if named.resolve() == parent:
                return Child(path, descriptor.parent_cid)
    return None


def _descriptor_of(path: Path) -> Descriptor | None:
    try:
        file = PosixFile.open(path)
    except PermissionError as error:
        if path.suffix.lower() == ".vmdk":
            raise InvalidRequest(path, "cannot be read, and may be an overlay on the image in question") from error
        return None
    except OSError:
        return None
    try:
        with contextlib.suppress(OSError, FormatError, Unsupported):
            return read_descriptor(file)[0]
        return None
    finally:
        file.close()
