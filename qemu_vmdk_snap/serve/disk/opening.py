"""Opening a chain to serve it: what others left unfinished first, then as any writer opens it."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qemu_vmdk_snap import Link, Resolver, open_chain, open_link, replace_file, require_writable
from qemu_vmdk_snap.chain.links import is_backed_by
from qemu_vmdk_snap.chain.look import notes
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.errors import CorruptChain, VmdkSnapError
from qemu_vmdk_snap.ops.edit.adopt import adopt
from qemu_vmdk_snap.ops.edit.trim import trim_link
from qemu_vmdk_snap.ops.journal.recover import settle
from qemu_vmdk_snap.storage.journal.grainlog import waiting_in
from qemu_vmdk_snap.storage.journal.record import refuse_pending


class TopNote:
    """The note beside the socket that names the top, which snapshots have moved away from the image first served.

    It is what a server that is started again with the old words follows; whoever starts it with newer ones is right.
    """

    def __init__(self, path: Path, image: Path) -> None:
        self._path, self._image = path, image

    def written(self) -> list[Path]:
        """Return the frozen link that a merge was writing when the server was killed: what it leaked is cut off."""
        note = self._read()
        return [Path(note["merging"])] if isinstance(note.get("merging"), str) else []

    def top(self, trusted_dirs: Sequence[Path | str] = ()) -> Path:
        """Return the top to serve: that of the note if it is backed by this image, else the image itself."""
        note = self._read()
        with contextlib.suppress(OSError, KeyError, TypeError, VmdkSnapError):
            for name in (note["top"], note["before"]):
                if self._fits(Path(name), trusted_dirs):
                    return Path(name)
        return self._image

    def _read(self) -> dict[str, Any]:
        """Return what is noted about this image; nothing from a file that others can write."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            facts = self._path.lstat()
            if stat.S_ISREG(facts.st_mode) and facts.st_uid in (0, os.geteuid()) and not facts.st_mode & 0o022:
                note = json.loads(self._path.read_bytes())
                if note["image"] == str(self._image):
                    return dict(note)
        return {}

    def _fits(self, top: Path, trusted_dirs: Sequence[Path | str]) -> bool:
        image = self._image
        # The image may have been merged away meanwhile.
        return top.exists() and (
            not image.exists() or is_backed_by(top, image, confined([*trusted_dirs, image.parent]))
        )

    def store(self, top: Path, before: Path, merging: Path | None) -> None:
        """Note the top, durably; it may not exist yet, and `before` is the top as long as it does not."""
        note = {"image": str(self._image), "top": str(top), "before": str(before)}
        if merging is not None:
            note["merging"] = str(merging)
        replace_file(self._path, json.dumps(note).encode() + b"\n", 0o600)


def open_served(
    path: Path, *, read_only: bool, trusted_dirs: Sequence[Path | str] = (), written: Sequence[Path] = ()
) -> list[Link]:
    """Return the links of the chain, the top first, locked as a writer locks them.

    What a killed operation or server left is finished first; what it stored and did not name is cut off, also of the
    frozen links in `written`.

    Raises:
        StillNeeded: an overlay is backed by the image: it is frozen.
        VmdkSnapError, OSError: what `open_chain` raises.
    """
    if read_only:
        refuse_pending(path)
        return list(open_chain(path, trusted_dirs=trusted_dirs).links)
    resolver = confined(trusted_dirs)
    for image in waiting_in(path.parent):
        try:
            adopt(image, resolver)
        except CorruptChain as error:  # nothing can be done about it, but it is not kept silent
            notes.say([str(error)])
        except (VmdkSnapError, OSError):
            if image.samefile(path):
                raise
    settle(path.parent, resolver=resolver)
    for image in written:
        with contextlib.suppress(OSError, VmdkSnapError):  # leaks do no harm, and others may be reading it
            _trim(image, resolver)
    require_writable(path, trusted_dirs=trusted_dirs)
    chain = open_chain(path, writable=True, trusted_dirs=trusted_dirs)
    try:
        trim_link(chain.links[0])
    except BaseException:
        with contextlib.suppress(OSError, VmdkSnapError):
            chain.close()
        raise
    return list(chain.links)


def _trim(image: Path, resolver: Resolver) -> None:
    link = open_link(image, writable=True, resolver=resolver)
    try:
        trim_link(link)
    finally:
        link.close()
