"""Is KVM told to be of use only where a boot has shown it, and is that tried once?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qemu_vmdk_snap import GuestError, create_image
from qemu_vmdk_snap.harness import accelerator, boot, machine

NO_GUEST = "/dev/kvm is there, but KVM boots no guest in time on this machine"


class Boots:
    """Boots that take so many seconds, or never end; counted."""

    def __init__(self) -> None:
        self.seconds: dict[str, float | None] = {"tcg": 0.1, "kvm": None}
        self.tried: list[str] = []

    def __call__(self, name: str, limit: float) -> float | None:
        self.tried.append(name)
        seconds = self.seconds[name]
        return seconds if seconds is not None and seconds <= limit else None


@pytest.fixture
def boots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Boots:
    made = Boots()
    monkeypatch.setattr(accelerator, "boot_seconds", made)
    monkeypatch.setattr(accelerator, "_KVM", tmp_path)
    monkeypatch.setattr(accelerator, "EXECUTABLE", "sh")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return made


def test_a_kvm_that_boots_nothing_is_tried_once(boots: Boots) -> None:
    assert [accelerator.kvm_fault(), accelerator.kvm_fault()] == [NO_GUEST, NO_GUEST]
    assert boots.tried == ["tcg", "kvm"]
    assert [accelerator.choose_accelerator(), accelerator.choose_accelerator()] == ["tcg", "tcg"]
    assert boots.tried == ["tcg", "kvm"] * 2
    assert accelerator.kvm_fault() == NO_GUEST
    assert boots.tried == ["tcg", "kvm"] * 2


def test_a_kvm_that_is_slow_is_not_chosen_and_has_no_fault(boots: Boots) -> None:
    boots.seconds["kvm"] = 1.0
    assert accelerator.choose_accelerator() == "tcg"
    assert accelerator.kvm_fault() is None
    assert boots.tried == ["tcg", "kvm"] * 2
    assert accelerator.choose_accelerator() == "tcg"


@pytest.mark.parametrize(("tcg", "kvm", "fault"), [(0.1, 1.9, False), (0.1, 5.0, True), (1.0, 5.0, False)])
def test_a_kvm_under_which_a_guest_seems_to_hang_has_one(boots: Boots, tcg: float, kvm: float, fault: bool) -> None:
    boots.seconds.update(tcg=tcg, kvm=kvm)
    assert accelerator.kvm_fault() == (NO_GUEST if fault else None)


def test_a_kvm_that_is_fast_is_known_to_boot(boots: Boots) -> None:
    boots.seconds["kvm"] = 0.01
    assert accelerator.choose_accelerator() == "kvm"
    assert accelerator.kvm_fault() is None
    assert boots.tried == ["tcg", "kvm"]


@pytest.mark.parametrize("text", ["", "[]", '{"boot_id": "another", "accelerator": "kvm", "kvm-in-time": true}'])
def test_a_record_of_another_time_or_none_is_not_believed(boots: Boots, tmp_path: Path, text: str) -> None:
    record = tmp_path / "qemu-vmdk-snap" / "accelerator.json"
    record.parent.mkdir()
    record.write_text(text)
    assert accelerator.kvm_fault() == NO_GUEST
    assert json.loads(record.read_text())["kvm-in-time"] is False
    assert accelerator.choose_accelerator() == "tcg"


def test_what_is_not_there_is_not_tried(boots: Boots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "EXECUTABLE", "no-such-qemu")
    assert accelerator.kvm_fault() is None
    monkeypatch.setattr(accelerator, "_KVM", tmp_path / "none")
    assert accelerator.kvm_fault() == "/dev/kvm cannot be used here"
    assert not boots.tried


@pytest.mark.needs("qemu-system-x86_64")
def test_a_guest_that_fails_under_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "kvm_fault", lambda: NO_GUEST)
    image = tmp_path / "a.vmdk"
    create_image(image, 1 << 20, durable=False)
    with pytest.raises(GuestError) as caught:
        boot(image, accelerator="kvm", qemu_args=["-no-such-option"], log_dir=tmp_path / "logs").__enter__()
    assert caught.value.reason.endswith(f"; {NO_GUEST} (see qemu-vmdk-snap doctor)")
    with pytest.raises(GuestError) as caught:
        boot(image, accelerator="tcg", qemu_args=["-no-such-option"], log_dir=tmp_path / "logs").__enter__()
    assert "KVM" not in caught.value.reason
