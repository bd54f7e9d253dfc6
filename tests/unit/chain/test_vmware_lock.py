"""Is a disk that VMware has open, has encrypted, or tracks, left alone?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qemu_vmdk_snap import LockBusy, Unsupported, create_image, create_overlay, open_chain
from qemu_vmdk_snap.chain.look.vmware_lock import refuse_vmware_lock, vmware_lock, vmware_lock_note
from qemu_vmdk_snap.cli.main import main


@pytest.fixture
def image(tmp_path: Path) -> Path:
    create_image(tmp_path / "a.vmdk", 1 << 20, kind="vmfs", durable=False)
    return tmp_path / "a.vmdk"


def hold(image: Path) -> Path:
    lock = image.with_name(f"{image.name}.lck") / "M41216.lck"
    lock.parent.mkdir()
    lock.write_text("vmx=...")
    return lock


def test_no_lock(image: Path) -> None:
    assert vmware_lock(image) is None
    image.with_name("a.vmdk.lck").mkdir()  # an empty one is left behind at each power-off
    image.with_name("a.vmdk.lck").joinpath("note.txt").touch()
    assert vmware_lock(image) is None
    assert vmware_lock_note(image) is None
    refuse_vmware_lock(image)
    with open_chain(image, writable=True) as chain:
        chain.write_at(0, b"x")


def test_a_file_of_that_name_is_no_lock(image: Path) -> None:
    image.with_name("a.vmdk.lck").touch()
    assert vmware_lock(image) is None


def test_a_held_disk_is_not_written_and_its_readers_are_warned(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = hold(image)
    before = image.read_bytes()
    with pytest.raises(LockBusy, match=re.escape(f"VMware has it open ({lock})")):
        refuse_vmware_lock(image)
    assert main(["image", "resize", str(image), "2M"]) == 75
    err = capsys.readouterr().err
    assert err == (
        f"qemu-vmdk-snap: {image}: in use: VMware has it open ({lock}); if no VMware product runs, remove the folder "
        f"{lock.parent}\n"
    )
    assert image.read_bytes() == before
    for words in (["info"], ["map"], ["convert", "-O", "raw"]):
        target = [str(image.with_name("o.raw"))] if len(words) > 1 else []
        assert main(["image", *words, str(image), *target]) == 0
        assert f"warning: {image}: VMware has it open ({lock})" in capsys.readouterr().err
    lock.unlink()
    assert main(["image", "resize", str(image), "2M"]) == 0


def test_an_overlay_on_a_held_base_says_so(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = hold(image)
    assert main(["image", "create", "-b", str(image), str(image.with_name("top.vmdk"))]) == 0
    assert f"warning: {image}: VMware has it open ({lock})" in capsys.readouterr().err


def put_in(image: Path, line: str) -> None:
    image.write_text(image.read_text().replace("CID=", f"{line}\nCID=", 1))


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('encryptionKeys="vmware:key/list/(pair/(fqid/<VMWARE-NULL>/x))"', "encryptionKeys"),
        ('ddb.iofilters = "vmwarevmcrypt"', "ddb.iofilters"),
        ('DDB.IOFilters="vmwarelwd,VMW_crypt"', "ddb.iofilters"),
    ],
)
def test_an_encrypted_disk_is_refused(image: Path, line: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    put_in(image, line)
    new = str(image.with_name("new"))
    for words in (
        ["info", str(image)],
        ["map", str(image)],
        ["convert", "-O", "raw", str(image), new],
        ["compare", str(image), str(image)],
        ["measure", str(image)],
        ["create", "-b", str(image), new],
        ["resize", str(image), "2M"],
    ):
        assert main(["image", *words]) == (2 if words[0] == "compare" else 63)
        err = capsys.readouterr().err
        assert re.fullmatch(rf".*a\.vmdk: byte 0x[0-9a-f]+: {key}: the disk is encrypted: .*\n", err)
    assert not Path(new).exists()


def test_other_filters_are_no_encryption(image: Path) -> None:
    put_in(image, 'ddb.iofilters = "vmwarelwd"')
    with open_chain(image, writable=True) as chain:
        chain.write_at(0, b"x")


def test_a_tracked_disk_is_read_and_not_written(image: Path) -> None:
    put_in(image, 'changeTrackPath="a-ctk.vmdk"')
    with open_chain(image) as chain:
        assert chain.read_at(0, 1) == b"\0"
    with pytest.raises(Unsupported, match=r"changeTrackPath = 'a-ctk\.vmdk': VMware tracks its changes"):
        open_chain(image, writable=True)
    top = image.with_name("top.vmdk")
    create_overlay(top, image, durable=False)
    with open_chain(top, writable=True) as chain:
        chain.write_at(0, b"x")
    assert main(["image", "commit", str(top)]) == 63
    with open_chain(top) as chain:
        assert chain.read_at(0, 1) == b"x"
