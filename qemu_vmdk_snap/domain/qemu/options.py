"""How the nodes of a disk are opened in QEMU: what the `<driver>` of its XML says, in the words of `blockdev-add`.

An overlay that is added to a running guest is opened as libvirt opens it at the next start. QEMU takes over nothing
from the node below: what is left out falls back to QEMU's defaults without a message.

    <driver>                      format node               file node
    cache="none|directsync"       cache.direct              cache.direct, and a descriptor with O_DIRECT
    cache="unsafe"                cache.no-flush            cache.no-flush
    io="native|threads|io_uring"                            aio
    discard="unmap"               discard                   (libvirt always lets it discard)
    detect_zeroes="on|unmap"      detect-zeroes

Write-back or write-through, the I/O thread, and throttling belong to the device, which stays as it is.
"""

from __future__ import annotations

import errno
import os
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_DIRECT: Final = ("none", "directsync")
_AIO: Final = ("native", "threads", "io_uring")


@dataclass(frozen=True, slots=True)
class DriverOptions:
    """Options of the nodes of one disk; the defaults are those of a disk whose XML says nothing."""

    direct: bool = False
    """Past the host's page cache: O_DIRECT."""
    no_flush: bool = False
    aio: str | None = None
    discard: bool = False
    detect_zeroes: str = "off"

    @property
    def cache(self) -> dict[str, bool]:
        """The option `cache` of every node."""
        return {"direct": self.direct, "no-flush": self.no_flush}

    def of_file(self) -> dict[str, Any]:
        """Return the options of the file node, which is all but its name and its file."""
        aio = {} if self.aio is None else {"aio": self.aio}
        return {"driver": "file", "cache": self.cache, "discard": "unmap", **aio}

    def of_format(self) -> dict[str, Any]:
        """Return the options of the format node, which is all but its name, its children and `read-only`."""
        return {
            "driver": "vmdk",
            "cache": self.cache,
            "discard": "unmap" if self.discard else "ignore",
            "detect-zeroes": self.detect_zeroes,
        }


def read_options(domain_xml: str) -> dict[str, DriverOptions]:
    """Return the options of each disk of the domain, by target."""
    found = {}
    for disk in ET.fromstring(domain_xml).findall("./devices/disk"):
        target, driver = disk.find("target"), disk.find("driver")
        if target is not None:
            found[target.get("dev", "")] = DriverOptions() if driver is None else _options(driver)
    return found


def lacks_direct_io(folder: Path) -> bool:
    """Return whether the file system of `folder` refuses O_DIRECT; False as well where that cannot be tried."""
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    try:
        os.close(os.open(folder, flags))
    except OSError:
        return False
    try:
        os.close(os.open(folder, flags | os.O_DIRECT))
    except OSError as error:
        return error.errno == errno.EINVAL
    return False


def _options(driver: ET.Element) -> DriverOptions:
    cache, io = driver.get("cache", "default"), driver.get("io")
    discard = driver.get("discard") == "unmap"
    zeroes = driver.get("detect_zeroes", "off")
    if zeroes == "unmap" and not discard:
        zeroes = "on"  # QEMU refuses the other; so does libvirt put it
    return DriverOptions(cache in _DIRECT, cache == "unsafe", io if io in _AIO else None, discard, zeroes)
