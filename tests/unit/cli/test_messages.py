"""Is one line one line, whatever the names and values in it?"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from qemu_vmdk_snap import FormatError, LockBusy, create_image, create_overlay
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import printable

EVIL = "a\n\x1b[31mb\rc\x7f\u2028d\x85\t\udcff.vmdk"
SHOWN = r"a\n\x1b[31mb\rc\x7f\u2028d\x85\t\xff.vmdk"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("größe 磁盘\u00a0\u3000 \ue000", "größe 磁盘\u00a0\u3000 \ue000"),
        (EVIL, SHOWN),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        (r"C:\n", r"C:\n"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_table_with_wide_and_combining_characters(capsys: pytest.CaptureFixture[str]) -> None:
    Ui().table(["Name", "State"], [["磁盘", "a"], ["e\u0301te\u0301", "b"], ["plain", "c"]])
    header, rule, *rows = capsys.readouterr().out.splitlines()
    assert header == "Name    State"
    assert rule == "-" * 13
    assert rows == ["磁盘    a", "e\u0301te\u0301     b", "plain   c"]


def test_errors_are_one_line() -> None:
    error = FormatError(Path(EVIL), 3, "field\n", b"\n", "rule\n")
    assert str(error) == rf"{SHOWN}: byte 0x3: field\n = b'\n': rule\n"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(LockBusy(Path("a"), "write")).startswith("a: failed to get the 'write' lock")
    assert str(LockBusy(Path("a"), "write", "by\nx")) == r"a: in use: by\nx"


def test_names_in_errors_warnings_and_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["image", "info", EVIL]) == 74
    assert capsys.readouterr().err == f"qemu-vmdk-snap: {SHOWN}: No such file or directory\n"
    Path(EVIL).write_bytes(b"nothing that is known\n" * 100)
    assert main(["image", "info", EVIL]) == 65
    err = capsys.readouterr().err
    assert err.startswith(f"qemu-vmdk-snap: {SHOWN}: byte 0x0: magic")
    assert err.count("\n") == 1
    Path(EVIL).unlink()
    create_image("base.vmdk", 1 << 20, durable=False)
    Path("base.vmdk").rename(EVIL)
    os.truncate(EVIL, Path(EVIL).stat().st_size + 1)
    assert main(["image", "info", EVIL]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == f"image: {SHOWN}"
    assert shown.err.startswith(f"qemu-vmdk-snap: warning: {SHOWN}: its length of ")
    assert "\x1b" not in shown.out + shown.err
    assert main(["image", "map", EVIL]) == 0
    assert shown.err == capsys.readouterr().err


def test_a_hint_with_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """VMware's escape for them is a bar and two digits, so a descriptor can name any."""
    create_image(tmp_path / "base.vmdk", 1 << 20, durable=False)
    create_overlay(tmp_path / "top.vmdk", tmp_path / "base.vmdk", durable=False)
    raw = (tmp_path / "top.vmdk").read_bytes()
    (tmp_path / "top.vmdk").write_bytes(raw.replace(b'"base.vmdk"', b'"b|0A|1B.v"'))
    assert main(["image", "info", str(tmp_path / "top.vmdk")]) == 0
    out = capsys.readouterr().out
    assert r"backing file: b\n\x1b.v (not found" in out
    assert "\x1b" not in out
    assert main(["image", "map", str(tmp_path / "top.vmdk")]) == 66
    assert r"its parent 'b\n\x1b.v' does not exist" in capsys.readouterr().err


def test_what_argparse_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["image", "info", "a", "b\n\x1b"])
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "\x1b" not in err


def test_lines_of_the_answer_and_tables(capsys: pytest.CaptureFixture[str]) -> None:
    ui = Ui()
    ui.text("\nbefore\rand\x1bafter\n")
    ui.text()
    ui.table(["name"], [["a\nb"]])
    ui.warn("one\nline")
    ui.warn("one\nline")
    shown = capsys.readouterr()
    assert shown.out == "\nbefore\\rand\\x1bafter\n\n\nname\n----\na\\nb\n"
    assert shown.err == "qemu-vmdk-snap: warning: one\\nline\n"
