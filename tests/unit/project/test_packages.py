"""Do the Debian and RPM packages agree with pyproject.toml, and do their scripts recognise libvirt's hook?"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qemu_vmdk_snap import __version__
from qemu_vmdk_snap.cli.commands import COMMANDS, TOP_LEVEL
from qemu_vmdk_snap.domain.hooks import install as hooks
from qemu_vmdk_snap.domain.hooks import policy as policies

ROOT = Path(__file__).parents[3]
DEBIAN = ROOT / "debian"
SPEC = (ROOT / "contrib/packages/qemu-vmdk-snap.spec").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HOOK = str(hooks.FOLDER / hooks.NAME)


def field(name: str) -> set[str]:
    """Return the packages that debian/control names in this field, without versions."""
    found = re.findall(rf"^{name}:\n((?: .*\n)+)", (DEBIAN / "control").read_text(), re.MULTILINE)
    return {line.split()[0].rstrip(",") for block in found for line in block.splitlines()}


def tags(name: str) -> list[str]:
    """Return the values of a tag in the spec."""
    return re.findall(rf"^{name}: +(.*)$", SPEC, re.MULTILINE)


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=~\[ ]", one)[0] for one in requirements}


def test_one_version() -> None:
    assert PROJECT["project"]["version"] == __version__
    changelog = (DEBIAN / "changelog").read_text()
    assert re.match(r"qemu-vmdk-snap \((.*)\) ", changelog)[1] == __version__  # type: ignore[index]
    assert tags("Version") == [__version__]
    assert re.search(r"%changelog\n\* .* - (\S+)-1\n", SPEC)[1] == __version__  # type: ignore[index]


def test_one_oldest_python() -> None:
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert f"X-Python3-Version: >= {oldest}\n" in (DEBIAN / "control").read_text()
    assert f"python3 >= {oldest}" in tags("Requires")


def test_the_same_dependencies() -> None:
    needed = {f"python3-{name}" for name in names(PROJECT["project"]["dependencies"])}
    assert needed == {"python3-argcomplete", "python3-numpy"}  # packages of every distribution
    assert needed <= {one.split()[0] for one in tags("Requires")}
    assert "${python3:Depends}" in field("Depends")  # what dh_python3 finds in the wheel
    optional = PROJECT["project"]["optional-dependencies"]
    assert names(optional["libvirt"]) | names(optional["harness"]) == {"libvirt-python", "pexpect"}
    for recommended in (field("Recommends"), set(tags("Recommends"))):
        assert {"python3-libvirt", "python3-pexpect"} <= recommended
    assert names(optional["fast"]) == {"deflate"}
    assert "deflate" not in (DEBIAN / "control").read_text() + SPEC  # no distribution has it
    builders = {f"python3-{name}" for name in names(PROJECT["build-system"]["requires"])}
    assert builders <= field("Build-Depends")
    assert builders <= set(tags("BuildRequires"))


def test_the_same_description() -> None:
    text = re.search(r"^Description: .*\n((?: .*\n)+)", (DEBIAN / "control").read_text(), re.MULTILINE)[1]  # type: ignore[index]
    told = re.search(r"%description\n(.*?)\n\n%prep", SPEC, re.DOTALL)[1]  # type: ignore[index]
    assert [line.strip().removeprefix(".") for line in text.splitlines()] == told.splitlines()


def test_every_kind_of_file_is_in_the_rpm() -> None:
    for script in PROJECT["project"]["scripts"]:
        assert f"%{{_bindir}}/{script}\n" in SPEC
    shared = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"]
    assert set(shared.values()) == {
        "share",
        "lib/systemd/system",
        "share/doc/qemu-vmdk-snap",
        "share/doc/qemu-vmdk-snap/examples",
        "share/doc/qemu-vmdk-snap/examples/monitoring",
        "share/doc/qemu-vmdk-snap/examples/probe",
    }
    for place in ("_mandir}/man1/", "_datadir}/bash-completion", "_datadir}/zsh", "_datadir}/fish", "_unitdir}/"):
        assert f"\n%{{{place}" in SPEC


@pytest.mark.parametrize("test", ["demo", "snapshot"])
def test_the_autopkgtests_call_commands_that_there_are(test: str) -> None:
    assert f"Tests: {test}\n" in (DEBIAN / "tests/control").read_text()
    for line in re.findall(r"^ *qemu-vmdk-snap ([a-z ]+)", (DEBIAN / "tests" / test).read_text(), re.MULTILINE):
        first, *rest = line.split()
        assert first in TOP_LEVEL or rest[0] in COMMANDS[first]


class Script:
    """A maintainer's script with the hook's place in a folder of the test, and a program that writes down its calls."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder = folder
        self.hook = folder / "hook"
        assert HOOK in text
        self.text = text.replace(HOOK, str(self.hook)).replace("#DEBHELPER#", "")
        program = folder / "qemu-vmdk-snap"
        program.write_text(f'#!/bin/sh\necho "$*" >>{folder}/calls\n')
        program.chmod(0o755)

    def calls(self, *words: str) -> list[str]:
        path = self.folder / "calls"
        path.unlink(missing_ok=True)
        environ = {"PATH": f"{self.folder}:/usr/bin:/bin"}
        subprocess.run(["sh", "-c", self.text, "script", *words], env=environ, check=True, timeout=100)
        return path.read_text().splitlines() if path.exists() else []


def section(name: str) -> str:
    return re.search(rf"^%{name}\n(.*?)\n\n%", SPEC, re.DOTALL | re.MULTILINE)[1]  # type: ignore[index]


UPGRADES = {
    "deb": ((DEBIAN / "qemu-vmdk-snap.postinst").read_text(), ("configure", "0.0.9"), ("configure", "")),
    "rpm": (re.sub(r"%\{.*", "", section("post")), ("2",), ("1",)),
}
REMOVALS = {
    "deb": ((DEBIAN / "qemu-vmdk-snap.prerm").read_text(), ("remove",), ("upgrade", "0.2")),
    "rpm": (re.sub(r"%\{.*", "", section("preun")), ("0",), ("1",)),
}


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the hook as `hook install` of the package writes it."""
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    return hooks._script(policies.FOLDER, {}, made=True)


@pytest.mark.parametrize("package", ["deb", "rpm"])
def test_an_upgrade_writes_the_packages_own_hook_anew(tmp_path: Path, ours: str, package: str) -> None:
    text, upgrade, install = UPGRADES[package]
    script = Script(tmp_path, text)
    assert script.calls(*upgrade) == []  # there is no hook
    script.hook.write_text(ours)
    assert script.calls(*upgrade) == ["hook install"]
    assert script.calls(*install) == []
    script.hook.write_text(ours.replace("/usr/bin/python3", "/opt/venv/bin/python"))
    assert script.calls(*upgrade) == []
    script.hook.write_text(ours.replace(str(policies.FOLDER), "/srv/policies"))
    assert script.calls(*upgrade) == []
    script.hook.write_text(ours.replace("if [ -n", "export QEMU_VMDK_SNAP_STATE=/srv\nif [ -n", 1))
    assert script.calls(*upgrade) == []


@pytest.mark.parametrize("package", ["deb", "rpm"])
def test_a_removal_takes_the_packages_own_hook_along(tmp_path: Path, ours: str, package: str) -> None:
    text, removal, upgrade = REMOVALS[package]
    script = Script(tmp_path, text)
    assert script.calls(*removal) == []
    script.hook.write_text(ours)
    assert script.calls(*upgrade) == []
    assert script.calls(*removal) == ["hook uninstall"]
    script.hook.write_text(ours.replace("/usr/bin/python3", "/opt/venv/bin/python"))
    assert script.calls(*removal) == []


def test_a_purge_keeps_unfinished_records(tmp_path: Path) -> None:
    text = (DEBIAN / "qemu-vmdk-snap.postrm").read_text().replace("#DEBHELPER#", "")
    for place in ("/etc", "/var/lib", "/run"):
        assert f"{place}/qemu-vmdk-snap" in text
        text = text.replace(f"{place}/qemu-vmdk-snap", f"{tmp_path}{place}")
    for name in ("etc/domains/web.toml", "var/lib/system-1.lock", "var/lib/system-2.lock", "run/served/x.lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    record = tmp_path / "var/lib/system-2.json"
    record.write_text("{}")
    command = ["sh", "-c", text, "postrm"]
    subprocess.run([*command, "remove"], check=True, timeout=100)
    assert (tmp_path / "etc/domains/web.toml").exists()
    done = subprocess.run([*command, "purge"], check=True, timeout=100, capture_output=True, text=True)
    assert done.stderr == f"qemu-vmdk-snap: {tmp_path}/var/lib is not empty: it was not removed\n"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [record]
    record.unlink()
    assert subprocess.run([*command, "purge"], check=True, timeout=100, capture_output=True, text=True).stderr == ""
    assert sorted(tmp_path.iterdir()) == [tmp_path / "var"]
