"""Small guests that boot on an image and report what they read; for the command line, and for tests.

The public names: `boot` (a machine with the probe running on an image), `attach` (a probe that runs elsewhere, for
instance in a libvirt domain), `verify_image`, and the pattern that probe and engine both write. `__init__.pyi` lists
all of them.
"""

from __future__ import annotations

from qemu_vmdk_snap.lazy import public_names

__getattr__, __dir__ = public_names(__name__, __file__)
