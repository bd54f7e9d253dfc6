"""Does the log say what was done, where it is asked for, and nowhere else?"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_vmdk_snap import create_image, create_overlay
from qemu_vmdk_snap.cli.main import main


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("QEMU_VMDK_SNAP_LOG", raising=False)
    create_image(tmp_path / "base.vmdk", 1 << 20, durable=False)
    create_overlay(tmp_path / "top.vmdk", tmp_path / "base.vmdk", durable=False)
    return tmp_path / "top.vmdk"


def test_debug_says_what_was_locked_and_journaled(top: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "commit", "--debug", str(top)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("qemu-vmdk-snap: debug: qemu_vmdk_snap.") for line in lines)
    said = "\n".join(lines)
    assert f"image commit --debug {top}, version " in lines[0]
    assert f"{top}: locked for writing" in said
    assert f"{top}: commit journaled in " in said
    assert said.index("journaled") < said.index("ended, its record is removed")
    assert lines[-1].endswith("exit status 0")
    assert logging.getLogger("qemu_vmdk_snap").level == logging.NOTSET  # as before


def test_a_log_file_is_added_to(top: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = top.with_name("log")
    monkeypatch.setenv("QEMU_VMDK_SNAP_LOG", str(file))
    assert main(["image", "info", str(top)]) == 0
    first = file.read_text().splitlines()
    assert main(["image", "info", "nothing\n.vmdk"]) == 74
    assert capsys.readouterr().err == "qemu-vmdk-snap: nothing\\n.vmdk: No such file or directory\n"
    lines = file.read_text().splitlines()
    assert lines[: len(first)] == first
    assert all(" INFO " in line or " DEBUG " in line for line in lines)
    assert lines[-1].endswith("exit status 74")


def test_a_log_that_cannot_be_written(
    top: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QEMU_VMDK_SNAP_LOG", str(top.parent / "no" / "log"))
    assert main(["image", "commit", "-d", str(top)]) == 74
    assert "QEMU_VMDK_SNAP_LOG: " in capsys.readouterr().err
    assert top.exists()


def test_nothing_without_asking(top: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "compact", "--debug", str(top)]) == 0
    capsys.readouterr()
    assert main(["image", "compact", str(top)]) == 0
    assert capsys.readouterr().err == ""


def test_a_program_gets_the_log(top: Path, caplog: pytest.LogCaptureFixture) -> None:
    from qemu_vmdk_snap import commit

    with caplog.at_level(logging.INFO, logger="qemu_vmdk_snap"):
        commit(top)
    names = {record.name for record in caplog.records}
    assert {"qemu_vmdk_snap.storage.journal.record", "qemu_vmdk_snap.ops.edit.commit"} <= names
    assert {Path(record.pathname).name for record in caplog.records} >= {"record.py", "commit.py"}


def test_no_command_imports_logging_for_itself(top: Path) -> None:
    code = (
        "import sys; from qemu_vmdk_snap.cli.main import main\n"
        f"assert main(['image', 'info', {str(top)!r}]) == 0; assert 'logging' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
