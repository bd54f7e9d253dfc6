"""Small guests that boot on an image and tell what they see; for the command line, and for anybody's tests.

The public names: `boot` (a machine with the probe running on an image), `attach` (a probe that runs elsewhere, for
instance in a libvirt domain), `verify_image`, and the pattern that probe and engine both write.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from qemu_vmdk_snap.harness.machine import CONTROLLERS, Machine, boot
    from qemu_vmdk_snap.harness.probe import disk_image, floppy_image
    from qemu_vmdk_snap.harness.seeded import pattern
    from qemu_vmdk_snap.harness.session import ProbeSession, attach
    from qemu_vmdk_snap.harness.verify import Mismatch, VerifyReport, verify_image

__all__ = [
    "CONTROLLERS",
    "Machine",
    "Mismatch",
    "ProbeSession",
    "VerifyReport",
    "attach",
    "boot",
    "disk_image",
    "floppy_image",
    "pattern",
    "verify_image",
]

_HOMES: Final = {
    "CONTROLLERS": "machine",
    "Machine": "machine",
    "boot": "machine",
    "pattern": "seeded",
    "disk_image": "probe",
    "floppy_image": "probe",
    "ProbeSession": "session",
    "attach": "session",
    "Mismatch": "verify",
    "VerifyReport": "verify",
    "verify_image": "verify",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
