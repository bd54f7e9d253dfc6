"""The UEFI variables of a domain in its XML, and the frozen copy of them in that of a snapshot.

    <os><nvram>/img/web_VARS.fd</nvram></os>                        the domain: the file that QEMU writes
    <os><nvram>/img/web_VARS.fd.snapshot-000001</nvram></os>        inside a snapshot: what it was then

As with the disks, the domain inside a snapshot names what was frozen. A domain that is defined from it gets the file
that is written: the name without its end.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from qemu_vmdk_snap.domain.xml.splice import spans, spliced
from qemu_vmdk_snap.light import Final, NamedTuple

_END: Final = re.compile(r"\.snapshot-\d{6}$")
_ROOTS: Final = (["domain"], ["domainsnapshot", "domain"], ["domainsnapshot", "inactiveDomain"])


class Nvram(NamedTuple):
    """What an XML says of the UEFI variables."""

    path: Path | None
    """None where it names no file."""
    raw: bool
    """Whether the file is the variables, byte for byte."""


def nvram_of(domain_xml: str) -> Nvram | None:
    """Return where the domain's UEFI variables are; None of a domain without."""
    os_element = ET.fromstring(domain_xml).find("os")
    if os_element is None:
        return None
    element, loader = os_element.find("nvram"), os_element.find("loader")
    if element is None:
        has = os_element.get("firmware") == "efi" or (loader is not None and loader.get("type") == "pflash")
        return Nvram(None, raw=False) if has else None
    name = _name(element)
    raw = element.get("type", "file") == "file" and element.get("format", "raw") == "raw"
    return Nvram(Path(name) if name else None, raw=raw)


def has_tpm_state(domain_xml: str) -> bool:
    """Return whether the domain has a TPM whose state is a folder of this host."""
    return ET.fromstring(domain_xml).find("./devices/tpm/backend[@type='emulator']") is not None


def next_copy(path: Path) -> Path:
    """Return the first free name for a frozen copy of the variables."""
    number = 1
    while (copy := path.with_name(f"{path.name}.snapshot-{number:06d}")).exists() or copy.is_symlink():
        number += 1
    return copy


def frozen_nvram(snapshot_xml: str) -> Path | None:
    """Return the frozen copy that the snapshot names; None where it has none."""
    root = ET.fromstring(snapshot_xml)
    for name in ("inactiveDomain", "domain"):
        element = root.find(f"./{name}/os/nvram")
        text = None if element is None else _name(element)
        if text and _END.search(text):
            return Path(text)
    return None


def with_nvram(text: str, path: Path) -> str:
    """Return the XML of a domain or a snapshot with another file of UEFI variables, where it names one."""
    raw = text.encode()
    for root in _ROOTS:
        raw = spliced(raw, spans(raw, [*root, "os", "nvram"]), lambda element: _set(element, str(path)))
    return raw.decode()


def nvram_out_of_snapshot(domain_xml: bytes) -> bytes:
    """Return the domain inside a snapshot with the file that is written in place of the frozen copy."""
    root = "inactiveDomain" if domain_xml.startswith(b"<inactiveDomain") else "domain"
    return spliced(
        domain_xml,
        spans(domain_xml, [root, "os", "nvram"]),
        lambda element: _set(element, _END.sub("", _name(element) or "")),
    )


def _name(element: ET.Element) -> str | None:
    source = element.find("source")
    return (element.text or "").strip() if source is None else source.get("file")


def _set(element: ET.Element, name: str) -> bool:
    if not name or name == _name(element):
        return False
    source = element.find("source")
    if source is None:
        element.text = name
    else:
        source.set("file", name)
    return True
