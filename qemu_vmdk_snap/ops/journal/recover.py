"""Finish what a killed operation has left half done: found by the intent records beside the images."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from qemu_vmdk_snap.errors import CorruptChain, LockBusy
from qemu_vmdk_snap.ops.edit.renew import sweep_drafts
from qemu_vmdk_snap.ops.journal.guard import WrittenMeanwhile, check_unwritten
from qemu_vmdk_snap.storage.blockfile import FileOpener, open_posix
from qemu_vmdk_snap.storage.durable import sweep_temporaries
from qemu_vmdk_snap.storage.intent import Intent, pending_in, sweep

FINISHERS: Final[dict[str, tuple[str, str]]] = {
    "commit": ("qemu_vmdk_snap.ops.edit.commit", "finish_commit"),
    "rebase": ("qemu_vmdk_snap.ops.edit.move", "finish_moves"),
    "remove": ("qemu_vmdk_snap.ops.edit.move", "finish_moves"),
    "compact": ("qemu_vmdk_snap.ops.edit.compact", "undo_compact"),
    "resize": ("qemu_vmdk_snap.ops.edit.resize", "finish_resize"),
    "apply": ("qemu_vmdk_snap.ops.edit.apply", "finish_apply"),
    "repair": ("qemu_vmdk_snap.ops.check.repair", "finish_repair"),
    "relink": ("qemu_vmdk_snap.ops.edit.rebase", "finish_relink"),
}
"""Operation -> module and function (intent, opener) that finishes it; running it twice does no harm."""


SWEEP: Final = "sweep"
"""What removing a temporary file is called among the operations; the image is that file."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """One operation that was finished, or one temporary file that was removed."""

    operation: str
    image: Path


def recover(folder: Path | str, *, opener: FileOpener = open_posix) -> list[Recovery]:
    """Finish every interrupted operation on the images in `folder` (or on the one image that is named), and tell which.

    Temporary files that killed commands have left there are removed, unless another process works in the folder.

    Raises:
        LockBusy: an operation is still running, or another process has one of its images open.
        CorruptChain: a record cannot be read or is another user's, or an image was written since.
        OSError: the system refused; the record stays, and so may be tried again.
    """
    folder = Path(folder)
    image = None if folder.is_dir() else folder
    if image is not None and not image.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    home = folder if image is None else folder.parent
    found = pending_in(home)
    sweep(home)
    wanted = [intent for intent in found if image is None or intent.involves(image)]
    for intent in wanted:
        _finish(intent, opener)
    swept = sweep_temporaries(home, image) + sweep_drafts(home, image)
    return [Recovery(intent.operation, intent.image) for intent in wanted] + [Recovery(SWEEP, path) for path in swept]


def settle(folder: Path, *, opener: FileOpener = open_posix) -> None:
    """Finish what was interrupted in `folder` before something new begins there; what is still running is let alone."""
    for intent in pending_in(folder, strict=False):
        with contextlib.suppress(LockBusy, WrittenMeanwhile):  # its images stay refused to writers; others go on
            _finish(intent, opener)


def _finish(intent: Intent, opener: FileOpener) -> None:
    if intent.operation not in FINISHERS:
        raise CorruptChain(intent.path, f"operation {intent.operation!r} is not known: a later version began it")
    module, name = FINISHERS[intent.operation]
    finisher = cast(Callable[[Intent, FileOpener], None], getattr(importlib.import_module(module), name))
    check_unwritten(intent)
    finisher(intent, opener)
    intent.end()
