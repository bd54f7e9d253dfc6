"""Snapshots of VMDK disks under QEMU and libvirt, proven by booting a guest on them.

    from qemu_vmdk_snap import create_image, create_overlay, open_chain

Each name is imported when it is first used, so that importing the package costs nothing. `__init__.pyi` lists all of
them: they are all that the plugins use of the engine. Sizes and offsets are bytes, a path is a `Path` or a `str`.
`qemu_vmdk_snap.domain` has the snapshots of libvirt's domains, `qemu_vmdk_snap.harness` the guests for tests.
docs/api.md shows how they are used.
"""

from __future__ import annotations

from qemu_vmdk_snap.lazy import public_names

__version__ = "0.1.0"

__getattr__, __dir__ = public_names(__name__, __file__)
