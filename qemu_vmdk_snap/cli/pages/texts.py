"""What manual pages say besides the arguments: exit statuses, files, environment, and what a group has in common."""

from __future__ import annotations

from typing import Final

STATUSES: Final = (
    ("0", "Done; for compare: the same; for check: good; for guest verify and demo: as expected."),
    ("1", "compare: different; guest verify and demo: a guest saw something else."),
    ("2, 3", "check: corrupt, leaks. compare: 2 for any error."),
    ("63", "Not supported."),
    ("64", "The command line or the request is invalid."),
    ("65", "A file breaks the format."),
    ("66", "The backing chain cannot be followed."),
    ("67", "CID mismatch: a parent was modified."),
    ("68", "Something else still needs a file that was to be removed or changed, or may need it."),
    ("69", "The libvirt domain does not allow it."),
    ("70", "A library, a tool or a drop-in is missing or failed."),
    ("71", "A guest, or the QEMU around it, failed."),
    ("74", "The system refused: no such file, no space, I/O error."),
    ("75", "Another process holds the image."),
    ("130", "Cancelled."),
)

ABOUT: Final = {
    "image": "Images are locked as QEMU locks them: one that a guest is writing is refused. Parents and extents are "
    "opened beside the file that names them, and in the folders that --allow-dir names. What is interrupted is "
    "finished or undone by the next command on the same images, and by qemu-vmdk-snap recover.",
    "snapshot": "The domain is named by name, id or UUID. Options may be before, between and after the names; --domain "
    "and --snapshotname name the two as virsh has them. What is interrupted is finished or taken back by the next "
    "command on the same domain, and by qemu-vmdk-snap recover.",
    "guest": "The guest is a program of a few kilobytes that QEMU boots in a tenth of a second; it reads and writes "
    "sectors of the disk and answers on a serial line. KVM is used where it is there, and is not needed.",
    "serve": "A server gives the guest a raw NBD disk on a Unix socket and writes the VMDK chain itself. "
    "libvirt's hook starts the servers of a domain before its guest and stops them after it.",
    "hook": "libvirt runs the hook when a guest starts and stops; a policy for each domain says what is done then.",
    "": "",
}

_RECORDS: Final = (
    ("/var/lib/qemu-vmdk-snap", "Records of unfinished operations on domains, as root."),
    ("~/.local/state/qemu-vmdk-snap", "The same of any other user; XDG_STATE_HOME moves it."),
    ("/etc/qemu-vmdk-snap/hooks.d", "Executables that are run before and after a snapshot, a revert and a delete."),
)
_POLICIES: Final = (
    ("/etc/libvirt/hooks/qemu.d", "Where libvirt looks for hooks."),
    ("/etc/qemu-vmdk-snap/domains", "The policies of domains: UUID.toml or NAME.toml."),
)

FILES: Final = {
    "image": ((".NAME.*.qemu-vmdk-snap*", "Beside an image: what an operation on it has not finished yet."),),
    "snapshot": _RECORDS,
    "serve": (
        ("/run/qemu-vmdk-snap", "Sockets of the servers and their logs, as root; QEMU_VMDK_SNAP_RUN moves it."),
        *_RECORDS,
    ),
    "hook": (*_POLICIES, *_RECORDS),
    "guest": (
        ("~/.cache/qemu-vmdk-snap", "What is kept of made guests and of this host's KVM; XDG_CACHE_HOME moves it."),
    ),
    "": (*_POLICIES, *_RECORDS),
}

_LOG: Final = (("QEMU_VMDK_SNAP_LOG", "A file to which the log of every command is appended; --debug shows it."),)
_LIBVIRT: Final = (
    ("LIBVIRT_DEFAULT_URI", "The connection where -c names none."),
    ("QEMU_VMDK_SNAP_STATE", "The folder of the records, instead of those under FILES."),
    ("QEMU_VMDK_SNAP_HOOKS", "The folder of the executables, instead of that under FILES."),
    ("QEMU_VMDK_SNAP_HOOKS_DEADLINE", "Seconds that each of them has."),
)

ENVIRONMENT: Final = {
    "image": _LOG,
    "snapshot": (*_LIBVIRT, *_LOG),
    "serve": (
        ("QEMU_VMDK_SNAP_RUN", "The folder of the sockets, instead of that under FILES."),
        *_LIBVIRT,
        *_LOG,
    ),
    "hook": (*_LIBVIRT, *_LOG),
    "guest": (("QEMU_VMDK_SNAP_TIMEOUT_SCALE", "How many times longer a guest is waited for."), *_LOG),
    "": (*_LIBVIRT, *_LOG),
}
