from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from qemu_vmdk_snap.domain.overlay import naming
from qemu_vmdk_snap.errors import InvalidRequest


@pytest.mark.parametrize(
    ("disk", "overlay"),
    [
        ("disk.vmdk", "disk-000001.vmdk"),
        ("disk-000001.vmdk", "disk-000002.vmdk"),
        ("disk-000099.vmdk", "disk-000100.vmdk"),
        ("disk-1.vmdk", "disk-1-000001.vmdk"),
        ("disk", "disk-000001.vmdk"),
        ("-000001.vmdk", "-000001-000001.vmdk"),
        ("a.b.vmdk", "a.b-000001.vmdk"),
    ],
)
def test_the_overlay_is_named_as_vmware_names_it(tmp_path: Path, disk: str, overlay: str) -> None:
    assert naming.next_overlay(tmp_path / disk) == tmp_path / overlay


def test_names_on_disk_and_names_taken_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "d-000001.vmdk").touch()
    (tmp_path / "d-000002.vmdk").symlink_to("nowhere")
    taken = {tmp_path / "d-000003.vmdk"}
    assert naming.next_overlay(tmp_path / "d.vmdk", taken) == tmp_path / "d-000004.vmdk"


def test_a_uuid_that_is_there_is_never_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, linked, taken, free = (uuid.UUID(int=number, version=4) for number in range(4))
    (tmp_path / f"{there}.vmdk").touch()
    (tmp_path / f"{linked}.vmdk").symlink_to("nowhere")
    drawn = iter([there, linked, taken, free])
    monkeypatch.setattr(uuid, "uuid4", lambda: next(drawn))
    found = naming.next_overlay(tmp_path / "d-000001.vmdk", {tmp_path / f"{taken}.vmdk"}, "uuid")
    assert found == tmp_path / f"{free}.vmdk"


def test_an_unknown_rule_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="'date' must be number or uuid"):
        naming.next_overlay(tmp_path / "d.vmdk", rule="date")  # type: ignore[arg-type]


def test_a_disk_without_a_free_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"no name d-NNNNNN\.vmdk is left"):
        naming.next_overlay(tmp_path / "d-999999.vmdk")


def test_a_name_too_long_for_its_overlay_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="longer than 255 bytes"):
        naming.next_overlay(tmp_path / f"{'x' * 250}.vmdk")


def test_the_default_snapshot_name_is_the_next_free_second() -> None:
    assert naming.default_snapshot_name((), 1000.9) == "1000"
    assert naming.default_snapshot_name(("1000", "1001"), 1000.9) == "1002"


@pytest.mark.parametrize(
    "name",
    ["", "a/b", ".hidden", "two\nlines", "tab\t", " space", "x" * 247, "nul\0", "\ud800", "\N{ZERO WIDTH SPACE}"],
)
def test_a_name_that_libvirt_or_a_file_system_cannot_keep_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="snapshot name"):
        naming.check_snapshot_name(name)


@pytest.mark.parametrize("name", ["1", "before update", "größer", "a.b", "x" * 246, "<&>"])
def test_other_names_are_accepted(name: str) -> None:
    naming.check_snapshot_name(name)


def test_a_description_must_fit_into_xml() -> None:
    naming.check_description("two lines\nand a\ttab, größer")
    with pytest.raises(InvalidRequest, match="control characters"):
        naming.check_description("bell\a")
