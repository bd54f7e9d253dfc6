"""Checks whether an image may be opened for writing by something else: a guest, for example."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qemu_vmdk_snap.chain.links import read_facts
from qemu_vmdk_snap.chain.needs.dependents import Census, require_one_name, require_unneeded, search_folders
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.storage.journal.record import refuse_pending


def require_writable(
    path: Path | str, *, trusted_dirs: Sequence[Path | str] = (), orphans: Sequence[Path | str] = ()
) -> None:
    """Require that the image may be written by a guest: nothing else needs it, and no operation on it is unfinished.

    Dependents are looked for beside the image and in `trusted_dirs` (not below); `orphans` are given up.

    Raises:
        StillNeeded: something is backed by the image, or shares its files, or may do so.
        CorruptChain: an operation on it has begun and not ended, or an extent is missing.
        FormatError, Unsupported, OSError: it cannot be read.
    """
    find = confined(trusted_dirs)
    facts = read_facts(path, resolver=find)
    refuse_pending(*facts.files)
    census = Census.of(search_folders(facts.files, find))
    given_up = [Path(one) for one in orphans]
    require_unneeded(facts.path, facts.files, census, orphans=given_up)
    require_one_name(facts.path, facts.files, census, orphans=given_up)
