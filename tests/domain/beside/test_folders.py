"""A chain over several folders: those that the XML names are allowed, and `--allow-dir` names others."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_vmdk_snap import CorruptChain, allowing, create_overlay, open_chain, read_links
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain import xml
from tests.domain.lab import Lab, xml_of

pytestmark = pytest.mark.needs("libvirt", "qemu-system-x86_64")


def test_a_parent_that_no_xml_names(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """libvirt finds it by itself; for us it is a file that an image names, until the user allows its folder."""
    other, home = lab.folder / "other", lab.folder / "home"
    for folder in (other, home):
        folder.mkdir()
    base = lab.disk("base", other)
    top = home / "top.vmdk"
    create_overlay(top, base)
    name = lab.define(top).name()
    allowed = ["--allow-dir", str(other), "-c", lab.uri]
    for words in (["snapshot", "create", name], ["snapshot", "adopt", name]):
        assert main([*words, "-c", lab.uri]) == 66
        assert f"allow {other} (--allow-dir) to follow it" in capsys.readouterr().err
    assert main(["doctor", name, "-c", lab.uri]) == 1
    assert f"allow {other} (--allow-dir)" in capsys.readouterr().out
    assert main(["doctor", name, *allowed]) == 0
    assert main(["snapshot", "create", name, "s1", "--dry-run", *allowed]) == 0
    assert main(["snapshot", "create", name, "s1", *allowed]) == 0
    (disk,) = xml.list_disks(xml_of(lab.conn.lookupByName(name)))
    assert disk.backing == (top, base)
    # From here on the XML names the folder, and that of the snapshot does.
    for words in (
        ["snapshot", "create", name, "s2"],
        ["snapshot", "list", name, "--sizes"],
        ["doctor", name],
        ["snapshot", "revert", name, "s1"],
        ["snapshot", "delete", name, "s1"],
        ["snapshot", "delete", name, "s2"],
        ["snapshot", "adopt", name],
        ["doctor", name],
    ):
        assert main([*words, "-c", lab.uri]) == 0, (words, capsys.readouterr())
        assert "allow-dir" not in capsys.readouterr().out


def test_the_folders_of_one_disk_are_those_of_the_domain(lab: Lab) -> None:
    """One disk's chain is not spelt out; the XML names the folder of its parent for another disk."""
    other, home = lab.folder / "other", lab.folder / "home"
    for folder in (other, home):
        folder.mkdir()
    base, second = lab.disk("base", other), lab.disk("second", other)
    top = home / "top.vmdk"
    create_overlay(top, base)
    name = lab.define(top, second).name()
    assert main(["snapshot", "create", name, "s1", "-c", lab.uri]) == 0
    assert main(["snapshot", "revert", name, "s1", "-c", lab.uri]) == 0
    assert main(["doctor", name, "-c", lab.uri]) == 0


def test_a_folder_is_allowed_within_the_block_alone(lab: Lab) -> None:
    other = lab.folder / "other"
    other.mkdir()
    top = lab.folder / "top.vmdk"
    create_overlay(top, lab.disk("base", other))
    with allowing(str(other)), allowing(Path("/nowhere")):
        assert len(read_links(top)) == 2
        with open_chain(top) as chain:
            assert chain.depth == 2
    with allowing(lab.folder, below=False), pytest.raises(CorruptChain, match="--allow-dir"):
        read_links(top)
    with allowing(lab.folder):
        assert len(read_links(top)) == 2
    with pytest.raises(CorruptChain, match="--allow-dir"):
        read_links(top)
