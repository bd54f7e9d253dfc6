"""Finish interrupted operations, which are found by the operation records beside the images."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, cast

from qemu_vmdk_snap.chain.resolver import Confined, Resolver, confined
from qemu_vmdk_snap.errors import CorruptChain, FormatError, LockBusy, VmdkSnapError
from qemu_vmdk_snap.light import dataclass
from qemu_vmdk_snap.ops.journal.guard import check_unwritten
from qemu_vmdk_snap.storage.blockfile import FileOpener, open_posix
from qemu_vmdk_snap.storage.durable import sweep_temporaries
from qemu_vmdk_snap.storage.journal.grainlog import waiting, waiting_in
from qemu_vmdk_snap.storage.journal.record import Operation, Pending, abandon, pending_in, sweep, taking_over

FINISHERS: Final[dict[str, tuple[str, str]]] = {
    "commit": ("qemu_vmdk_snap.ops.edit.commit", "finish_commit"),
    "rebase": ("qemu_vmdk_snap.ops.edit.move", "finish_moves"),
    "remove": ("qemu_vmdk_snap.ops.edit.move", "finish_moves"),
    "resize": ("qemu_vmdk_snap.ops.edit.resize", "finish_resize"),
    "apply": ("qemu_vmdk_snap.ops.edit.apply", "finish_apply"),
    "repair": ("qemu_vmdk_snap.ops.check.repair", "finish_repair"),
    "relink": ("qemu_vmdk_snap.ops.edit.rebase", "finish_relink"),
    "renew": ("qemu_vmdk_snap.ops.edit.renew", "finish_renew"),
}
"""Operation -> module and function (operation, opener) that finishes it; it can be run twice."""


SWEEP: Final = "sweep"
"""The name of the operation that removes a temporary file; its image is that file."""

SERVE: Final = "serve"
"""What adopting the grains of a killed server is called among the operations."""

_MALFORMED: Final = (KeyError, TypeError, ValueError, AttributeError, IndexError)
"""What a finisher raises for a record that can be read but is incomplete."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """One operation that was finished or abandoned, or one temporary file that was removed."""

    operation: str
    image: Path
    images: tuple[Path, ...] = ()
    """Of an operation that was abandoned: every image that it was about to change."""

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types, as `recover --output=json` lists it."""
        return {"operation": self.operation, "image": str(self.image)}


def recover(
    folder: Path | str, *, trusted_dirs: Sequence[Path | str] = (), opener: FileOpener = open_posix
) -> list[Recovered]:
    """Finish every interrupted operation on the images in `folder` (or on the one image that is named); return which.

    Files in other folders are written only where these are among `trusted_dirs`. Temporary files that killed commands
    have left there are removed, unless another process works in the folder. An operation that cannot be finished does
    not stop the others; the first such error is raised at the end.

    Raises:
        LockBusy: an operation is still running, or another process has one of its images open.
        CorruptChain: a record cannot be followed, or an image was written since.
        OSError: the system refused; the record stays, so this can be repeated.
    """
    home, image = _place(Path(folder))
    named = None if image is None else image.resolve()
    found = pending_in(home, allowed=trusted_dirs)
    sweep(home)
    done: list[Recovered] = []
    failure: Exception | None = None
    # First what was acknowledged: whoever finishes an operation cuts off what no table names.
    for one in waiting_in(home):
        try:
            if named in (None, one):
                _adopt(one, confined(trusted_dirs))
                done.append(Recovered(SERVE, one))
        except (VmdkSnapError, OSError) as error:
            failure = failure or error
    for pending in found:
        if image is not None and not pending.involves(image):
            continue
        try:
            operation = _finish(pending, opener, trusted_dirs)
        except (VmdkSnapError, OSError) as error:
            failure = failure or error
        else:
            done += [Recovered(operation.name, operation.image)] if operation is not None else []
    swept = sweep_temporaries(home, image)
    if failure is not None:
        raise failure
    return done + [Recovered(SWEEP, path) for path in swept]


def give_up(folder: Path | str) -> list[Recovered]:
    """Abandon every interrupted operation on the images in `folder` (or on the one image); return which.

    The images are not changed, even if partly done: for operations that cannot be finished.

    Raises:
        LockBusy: an operation is running; those before it are abandoned.
    """
    home, image = _place(Path(folder))
    gone: list[Recovered] = []
    for pending in pending_in(home):
        if image is None or pending.involves(image) or image in (pending.path, pending.found_as):
            abandon(pending)
            name = pending.operation.name if pending.operation is not None else "unreadable"
            images = pending.operation.images if pending.operation is not None else ()
            gone.append(Recovered(name, pending.path if pending.operation is None else pending.operation.image, images))
    return gone


def settle(folder: Path, *, opener: FileOpener = open_posix, resolver: Resolver | None = None) -> None:
    """Finish interrupted operations in `folder` before a new one begins there.

    Operations that are running or cannot be finished are skipped: only their images stay refused to writers.
    """
    allowed = resolver.trusted if isinstance(resolver, Confined) else ()
    for image in waiting_in(folder):
        with contextlib.suppress(LockBusy, CorruptChain, FormatError):
            _adopt(image, resolver or confined())
    for pending in pending_in(folder, allowed=allowed):
        with contextlib.suppress(LockBusy, CorruptChain):
            _finish(pending, opener, allowed)


def _adopt(image: Path, resolver: Resolver) -> None:
    """Name the grains that a killed server has left."""
    module = importlib.import_module("qemu_vmdk_snap.ops.edit.adopt")
    cast(Callable[[Path, Resolver], int], module.adopt)(image, resolver)


def _place(folder: Path) -> tuple[Path, Path | None]:
    """Return the folder to look through, and the image if it is one that was named."""
    if folder.is_dir():
        return folder, None
    if not folder.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    return folder.parent, folder


def _finish(pending: Pending, opener: FileOpener, allowed: Sequence[Path | str]) -> Operation | None:
    """Finish one operation and return it; None if another process has finished it."""
    with taking_over(pending, allowed=allowed) as operation:
        if operation is None:
            return None
        if operation.name not in FINISHERS:
            raise CorruptChain(pending.path, f"operation {operation.name!r} is not known: a later version began it")
        for image in operation.images:
            if (left := waiting(image)) is not None:  # it could not be adopted: nothing may be cut off
                left.close()
                raise LockBusy(image, "what its killed server acknowledged and did not store")
        module, name = FINISHERS[operation.name]
        finisher = cast(Callable[[Operation, FileOpener], None], getattr(importlib.import_module(module), name))
        try:
            check_unwritten(operation)
            finisher(operation, opener)
        except _MALFORMED as error:
            what = type(error).__name__
            reason = f"the operation record is damaged ({what}): `recover --abandon` gives it up"
            raise CorruptChain(pending.path, reason) from error
        operation.end()
        return operation
