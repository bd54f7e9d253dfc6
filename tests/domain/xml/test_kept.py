"""What a domain's metadata tells of kept branches; the rest of the XML stays byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_vmdk_snap.domain.xml.kept import kept_branches, with_kept_branches

KEPT = {Path("/img/a & 'b' \"c\".vmdk"): "s<1>", Path("/img/é.vmdk"): "s2"}
OTHER = "<kept:branches xmlns:kept='urn:somebody:else'>mine</kept:branches>"


@pytest.mark.parametrize(
    "metadata", ["", "<metadata/>", "<metadata></metadata>", f"\n  <metadata>\n    {OTHER}\n  </metadata>"]
)
def test_written_and_read_back(metadata: str) -> None:
    text = f"<domain><name>d</name>{metadata}<memory>1</memory></domain>"
    told = with_kept_branches(text, KEPT)
    assert kept_branches(told) == KEPT
    assert told.count("<metadata>") == 1
    assert OTHER in told or OTHER not in text
    fewer = with_kept_branches(told, dict(list(KEPT.items())[:1]))
    assert list(kept_branches(fewer)) == list(KEPT)[:1]
    without = with_kept_branches(fewer, {})
    assert kept_branches(without) == {}
    assert without.replace("\n  <metadata></metadata>", "").replace("<metadata></metadata>", "") in (
        text,
        text.replace("<metadata/>", ""),
        text.replace("<metadata></metadata>", ""),
    )


def test_nothing_to_tell_changes_nothing() -> None:
    text = f"<domain><name>d</name><metadata>{OTHER}</metadata></domain>"
    assert with_kept_branches(text, {}) == text
