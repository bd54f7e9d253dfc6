"""What is checked when an image is opened besides its own bytes: encryption, change tracking, VMware's locks.

A disk that VMware has encrypted cannot be read at all. One whose changes VMware tracks must not be written without
writing the tracking file: the next incremental backup would miss the changes. One that a VMware product has open is not
written, and reading it gives a warning.
"""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.chain.look.mistaken import descriptor_naming
from qemu_vmdk_snap.chain.look.vmware_lock import refuse_vmware_lock, vmware_lock_note
from qemu_vmdk_snap.errors import Unsupported
from qemu_vmdk_snap.storage.journal.grainlog import waiting
from qemu_vmdk_snap.vmdk.descriptor import Descriptor


def look_at(descriptor: Descriptor, *, writable: bool) -> list[str]:
    """Return the warnings for opening the image with this descriptor, one line each.

    Raises:
        Unsupported: it is encrypted; or, for writing, VMware tracks its changes.
        LockBusy: for writing, a VMware product has it open.
    """
    refuse_encrypted(descriptor)
    if writable:
        refuse_tracked(descriptor)
        refuse_vmware_lock(descriptor.path)
        return []
    return [note for note in (vmware_lock_note(descriptor.path), killed_server_note(descriptor.path)) if note]


def killed_server_note(path: Path) -> str | None:
    """Return the warning that grains which a killed server has acknowledged are not seen, None where none are."""
    left = waiting(path)
    if left is None:
        return None
    left.close()
    return f"{path}: its server was killed: what it acknowledged last is seen only after `recover {path}`"


def refuse_encrypted(descriptor: Descriptor) -> None:
    """Refuse a disk that VMware has encrypted; raises Unsupported."""
    if (key := descriptor.encryption) is not None:
        feature = f"byte {descriptor.offset_of(key):#x}: {key}: the disk is encrypted: only VMware can decrypt it"
        raise Unsupported(descriptor.path, feature)


def refuse_tracked(descriptor: Descriptor) -> None:
    """Refuse to write a disk whose changes VMware tracks; raises Unsupported."""
    if name := descriptor.get("changeTrackPath"):
        feature = (
            f"byte {descriptor.offset_of('changeTrackPath'):#x}: changeTrackPath = {name!r}: VMware tracks its "
            "changes, and the next incremental backup would miss what is written here: to write the disk, remove the "
            "line from the descriptor and make a full backup next"
        )
        raise Unsupported(descriptor.path, feature)


def refuse_delta(path: Path) -> None:
    """Refuse a COWD extent that a descriptor beside it names: it has only the changes, not the disk.

    Disks from before descriptors existed are COWD files that no descriptor names.

    Raises:
        Unsupported: such a descriptor is there.
    """
    owner = descriptor_naming(path)
    if owner is not None:
        raise Unsupported(path, f"is an extent (COWD) of {owner}: open that descriptor instead")
