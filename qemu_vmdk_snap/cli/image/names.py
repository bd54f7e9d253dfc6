"""The names of images on the command line: files, with or without `file:` before them, and nothing else.

qemu-img takes what stands before a colon for a protocol, unless a slash comes first. Of these we open files alone. A
name that means something else there is never made a file of: a script would look for its image at the other place.
"""

from __future__ import annotations

import os
from pathlib import Path

from qemu_vmdk_snap.errors import Unsupported
from qemu_vmdk_snap.light import Final

_FILE: Final = "file:"
# Names by which QEMU, in some build, opens something else than a file. A file that has such a name is meant by ./NAME.
_PROTOCOLS: Final = frozenset(
    (
        *("json", "driver", "blkdebug", "blkverify", "blkreplay", "quorum", "fat", "null-co", "null-aio"),
        *("nbd", "nbds", "nbd+tcp", "nbd+unix", "http", "https", "ftp", "ftps", "tftp", "ssh", "sftp", "nfs", "rbd"),
        *("iscsi", "iser", "gluster", "gluster+tcp", "gluster+unix", "gluster+rdma", "sheepdog", "vxhs", "nvme"),
        *("host_device", "host_cdrom", "vhost-user"),
    )
)


def file_name(text: str, folder: Path = Path()) -> str:
    """Return the name of the file that `text` means, as seen from `folder`.

    Raises:
        Unsupported: it means something else.
    """
    first = text.split("/", 1)[0]
    protocol, colon, _ = first.partition(":")
    if not colon:
        return text
    if text.startswith(_FILE):
        return text.removeprefix(_FILE)
    if protocol.lower() not in _PROTOCOLS and os.path.lexists(folder / text):
        return text
    feature = f"{protocol!r} is taken for a protocol, and only files are opened (a file of this name is ./{text})"
    raise Unsupported(Path(text), feature)


def image_file(text: str) -> Path:
    """Return the file that `text` means: the type of a command's arguments. Raises as `file_name`."""
    return Path(file_name(text))
