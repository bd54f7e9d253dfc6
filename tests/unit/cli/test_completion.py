"""What bash, zsh and fish offer, asked of the shells themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_vmdk_snap.cli.main import main

SHELLS = ("bash", "zsh", "fish")

ASK = {
    # As bash calls it: COMP_WORDS would do for a function of ours, argcomplete reads the line.
    "bash": '. {script}; COMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; COMP_TYPE=9; COMPREPLY=(); '
    '_python_argcomplete qemu-vmdk-snap; printf "%s\\n" "${{COMPREPLY[@]}}"',
    "fish": 'source {script}; complete -C "{line}"',
}


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    """Return the script of each shell."""
    words = [sys.executable, "-m", "qemu_vmdk_snap", "completion"]
    return {
        shell: subprocess.run([*words, shell], capture_output=True, text=True, check=True).stdout for shell in SHELLS
    }


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scripts: dict[str, str]) -> Path:
    """Return a folder with the script of each shell; the program is on PATH."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LIBVIRT_DEFAULT_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    for shell, script in scripts.items():
        (tmp_path / shell).write_text(script)
    (tmp_path / "disk.vmdk").touch()
    (tmp_path / "images").mkdir()
    return tmp_path


def offered(home: Path, shell: str, line: str) -> list[str]:
    ask = ASK[shell].format(script=home / shell, line=line)
    done = subprocess.run([shell, "-c", ask], capture_output=True, text=True, check=True, timeout=60)
    return [row.split("\t")[0].strip() for row in done.stdout.splitlines() if row.strip()]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sn", ["snapshot"]),
        ("image conv", ["convert"]),
        ("image convert --back", ["--backing", "--backing-format"]),
        ("image info --output j", ["json"]),
        ("image info --output=j", ["json"]),
        ("demo --k", ["--keep"]),
        ("serve sta", ["start", "status"]),
        ("serve di", ["disk.vmdk"]),
        ("image info di", ["disk.vmdk"]),
        ("snapshot move web ", ["images/"]),
        ("snapshot list -c qemu:///se", ["qemu:///session"]),
    ],
)
def test_bash(home: Path, line: str, expected: list[str]) -> None:
    found = offered(home, "bash", f"qemu-vmdk-snap {line}")
    assert [one.removeprefix("--output=").rpartition("qemu:")[2] or one for one in found] == [
        one.removeprefix("qemu:") for one in expected
    ]


@pytest.mark.needs("fish")
def test_fish(home: Path) -> None:
    assert offered(home, "fish", "qemu-vmdk-snap snapshot de") == ["delete", "describe", "destroy"]
    assert offered(home, "fish", "qemu-vmdk-snap hook st") == ["status"]


@pytest.mark.needs("zsh")
def test_zsh_takes_the_script(home: Path) -> None:
    ask = f"autoload -Uz compinit; compinit -u; source {home / 'zsh'}; print $_comps[qemu-vmdk-snap]"
    done = subprocess.run(["zsh", "-f", "-c", ask], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("_python_argcomplete", "")


@pytest.mark.needs("zsh")
def test_zsh_is_offered_the_same_with_an_argcomplete_that_does_not_know_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("argcomplete.shell_integration.shellcode", lambda *_, **__: "")
    assert main(["completion", "zsh"]) == 0
    (home / "zsh").write_text(capsys.readouterr().out)
    for line, expected in (("hook st", ["status"]), ("image co", ["commit", "compact", "compare", "convert"])):
        ask = (
            f"autoload -Uz compinit; compinit -u; source {home / 'zsh'}; print $_comps[qemu-vmdk-snap]\n"
            'compadd() { shift; print -l -- "$@" }\n'
            f"words=(qemu-vmdk-snap) BUFFER='qemu-vmdk-snap {line}'\n"
            "CURSOR=${#BUFFER}; _python_argcomplete"
        )
        done = subprocess.run(["zsh", "-f", "-c", ask], capture_output=True, text=True, check=True, timeout=60)
        assert done.stderr == ""
        first, *offered = done.stdout.split()
        assert (first, sorted(offered)) == ("_python_argcomplete", expected)
