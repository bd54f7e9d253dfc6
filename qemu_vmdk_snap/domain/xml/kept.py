"""Which files a revert has kept: previous tops of the domain that are in no snapshot.

They are listed in the domain's own metadata, so that they move with its XML and libvirt changes both in one step:

    <metadata><kept:branches xmlns:kept="..."><kept:branch snapshot="s1" file="/img/a-000002.vmdk"/></kept:branches>

An entry exists as long as its file. Only `doctor` uses it: nothing is opened for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final
from xml.sax.saxutils import quoteattr

from qemu_vmdk_snap.domain.xml import root_of, spans

NAMESPACE: Final = "urn:qemu-vmdk-snap:kept:1"


def kept_branches(domain_xml: str) -> dict[Path, str]:
    """Return each kept file, and the snapshot that the domain was reverted to."""
    entries = root_of(domain_xml).iterfind(f"./metadata/{{{NAMESPACE}}}branches/{{{NAMESPACE}}}branch")
    return {Path(entry.get("file", "")): entry.get("snapshot", "") for entry in entries}


def with_kept_branches(domain_xml: str, kept: Mapping[Path, str]) -> str:
    """Return the XML with exactly these files listed; the rest of it stays byte for byte."""
    raw = domain_xml.encode()
    for start, end in reversed(_ours(raw)):
        raw = raw[:start] + raw[end:]
    if not kept:
        return raw.decode()
    element = _element(kept.items()).encode()
    found = spans(raw, ["domain", "metadata"])
    if found and raw[slice(*found[0])].endswith(b"</metadata>"):
        at = found[0][1] - len(b"</metadata>")
        return (raw[:at] + element + raw[at:]).decode()
    raw = raw[: found[0][0]] + raw[found[0][1] :] if found else raw  # an empty `<metadata/>`
    at = spans(raw, ["domain", "name"])[0][1]
    return (raw[:at] + b"\n  <metadata>" + element + b"</metadata>" + raw[at:]).decode()


def _ours(raw: bytes) -> list[tuple[int, int]]:
    # libvirt keeps the prefix as it was written; the element is ours only if it has our namespace.
    found = spans(raw, ["domain", "metadata", "kept:branches"])
    return [(start, end) for start, end in found if NAMESPACE.encode() in raw[start:end]]


def _element(entries: Iterable[tuple[Path, str]]) -> str:
    branches = "".join(
        f"<kept:branch snapshot={quoteattr(snapshot)} file={quoteattr(str(path))}/>" for path, snapshot in entries
    )
    return f'<kept:branches xmlns:kept="{NAMESPACE}">{branches}</kept:branches>'
