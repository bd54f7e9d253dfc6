"""The libvirt plugin: snapshots of the VMDK disks of domains, registered in libvirt's own metadata.

    from qemu_vmdk_snap.domain import connection, create_snapshot, list_snapshots

A function takes an open connection and a domain by name, id or UUID, and returns a report: `changed` says whether
anything was changed, `as_dict()` is what the command prints as JSON, and `dry_run=True` returns the plan and changes
nothing. Errors have a `code`: see docs/json.md.
`__init__.pyi` lists all names.
"""

from __future__ import annotations

from qemu_vmdk_snap.lazy import public_names

__getattr__, __dir__ = public_names(__name__, __file__)
