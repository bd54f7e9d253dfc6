"""`bootstrap` on pretended machines: package tools, Python and pip are scripts that write down how they were called."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TOOLS = (
    "awk",
    "cat",
    "cut",
    "dirname",
    "env",
    "flock",
    "grep",
    "head",
    "mkdir",
    "mv",
    "rm",
    "sed",
    "sh",
    "sha256sum",
    "sleep",
    "tail",
    "tr",
)

DEBIAN = "ID=debian\nVERSION_ID=13\n"
UBUNTU = "ID=ubuntu\nID_LIKE=debian\n"
FEDORA = 'ID=fedora\nVERSION_ID="42"\n'

# Stands for the distribution's Python and, as a copy, for the one in .venv.
FAKE_PYTHON = """\
echo "python $*" >>"$CALLS"
case "$*" in
*platform*) cat "$MACHINE/python-version" ;;
*sys.prefix*) echo "${0%/bin/python}" ;;
*"import libvirt"*) [ ! -e "$MACHINE/no-libvirt" ] ;;
"-m venv"*)
    for venv; do :; done
    mkdir -p "$venv/bin"
    echo 'include-system-site-packages = true' >"$venv/pyvenv.cfg"
    echo "version = $(cat "$MACHINE/python-version")" >>"$venv/pyvenv.cfg"
    cat "$0" >"$venv/bin/python"
    printf '#!%s\\n' "$venv/bin/python" >"$venv/bin/pip"
    printf '#!/bin/sh\\necho "demo $* in $PWD"\\n' >"$venv/bin/qemu-vmdk-snap"
    chmod +x "$venv/bin/python" "$venv/bin/qemu-vmdk-snap"
    ;;
esac
"""


class Machine:
    """A pretended machine with a checkout in a folder whose path has spaces."""

    def __init__(self, folder: Path, os_release: str) -> None:
        self.folder, self.bin, self.checkout = folder, folder / "bin", folder / "a check out"
        self.calls_file = folder / "calls"
        self.calls_file.touch()
        (self.checkout / ".ci").mkdir(parents=True)
        self.bin.mkdir()
        for tool in (*TOOLS, "chmod"):
            (self.bin / tool).symlink_to(_which(tool))
        (folder / "os-release").write_text(os_release)
        (folder / "python-version").write_text("3.13.5\n")
        (folder / "installed").touch()
        self.script("python3", FAKE_PYTHON)
        self.script("id", "echo 0\n")
        # What is asked for and is in the file `installed`, in the answer format of each.
        self.script(
            "dpkg-query", 'shift 3; for p; do ! grep -qx "$p" "$MACHINE/installed" || echo "installed $p"; done\n'
        )
        self.script(
            "rpm",
            'shift 3; for p; do if grep -qx "$p" "$MACHINE/installed"; then echo "$p"; '
            'else echo "package $p is not installed"; fi; done\n',
        )
        for manager in ("apt-get", "dnf"):
            self.script(
                manager,
                f'echo "{manager} $*" >>"$CALLS"\n[ ! -e "$MACHINE/broken" ] || exit 100\n'
                'for word; do echo "$word" >>"$MACHINE/installed"; done\n'
                'case "$*" in *download*) for deb; do :; done; : >"${deb}_1_amd64.deb" ;; esac\n',
            )
        self.script("dpkg-deb", 'echo "dpkg-deb $*" >>"$CALLS"; mkdir -p "$3/usr/bin"; : >"$3/usr/bin/promtool"\n')
        text = (ROOT / "bootstrap").read_text()
        assert "\nPYTHON=/usr/bin/python3 " in text
        text = text.replace("\nPYTHON=/usr/bin/python3 ", f"\nPYTHON={self.bin}/python3 ")
        text = text.replace("\nOS_RELEASE=/etc/os-release", f"\nOS_RELEASE={folder}/os-release")
        text = text.replace("\nSYSTEMD=/run/systemd/system ", f"\nSYSTEMD={folder}/systemd ")
        self.script(
            "systemctl",
            'echo "systemctl $*" >>"$CALLS"\ncase $1 in list-unit-files) cat "$MACHINE/enabled" ;; esac\n',
        )
        (self.checkout / "bootstrap").write_text(text.replace(":/usr/sbin:/sbin", ""))
        (self.checkout / "bootstrap").chmod(0o755)
        (self.checkout / "pyproject.toml").write_text("[project]\n")
        (self.checkout / ".ci/gates").write_text('echo "gates" >>"$CALLS"; [ ! -e "$MACHINE/bad-gates" ]\n')

    def script(self, name: str, body: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{body}")
        path.chmod(0o755)

    def run(self, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.checkout / "bootstrap", *words],
            cwd=cwd or self.folder,
            env={"PATH": str(self.bin), "MACHINE": str(self.folder), "CALLS": str(self.calls_file)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    def calls(self, program: str) -> list[str]:
        """Return the calls of `program` since the last time, without its name, and forget them all."""
        lines = self.calls_file.read_text().splitlines()
        self.calls_file.write_text("")
        return [line.removeprefix(program).strip() for line in lines if line.split()[0] == program]


def _which(tool: str) -> str:
    for folder in ("/usr/bin", "/bin"):
        if os.access(f"{folder}/{tool}", os.X_OK):
            return f"{folder}/{tool}"
    raise AssertionError(f"{tool}: bootstrap relies on it, and it is not here")


@pytest.fixture
def debian(tmp_path: Path) -> Machine:
    return Machine(tmp_path, DEBIAN)


@pytest.fixture
def fedora(tmp_path: Path) -> Machine:
    return Machine(tmp_path, FEDORA)


def test_help_names_every_command(debian: Machine) -> None:
    done = debian.run("--help")
    assert done.returncode == 0
    assert all(
        f"\n  {word} " in done.stdout for word in ("demo", "test", "lint", "setup", "test-on", "package", "--no-system")
    )


@pytest.mark.parametrize(("words", "complaint"), [((), "usage"), (("x",), "unknown command x"), (("-x",), "option -x")])
def test_a_wrong_command_line_is_refused(debian: Machine, words: tuple[str, ...], complaint: str) -> None:
    done = debian.run(*words)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert debian.calls_file.read_text() == ""


@pytest.mark.parametrize("os_release", [DEBIAN, UBUNTU])
def test_apt_installs_what_is_missing_and_only_that(tmp_path: Path, os_release: str) -> None:
    machine = Machine(tmp_path, os_release)
    (tmp_path / "installed").write_text("seabios\nnasm\n")
    done = machine.run("setup")
    assert done.returncode == 0, done.stderr
    shown = done.stderr.splitlines()[0].removeprefix("==> missing system packages: ").split()
    update, install = machine.calls("apt-get")
    assert update.endswith(" update")
    assert install.split("--no-install-recommends ")[1].split() == shown
    assert {"qemu-system-x86", "python3-libvirt", "python3-venv"} <= set(shown)
    assert not {"seabios", "nasm"} & set(shown)


def test_another_debian_takes_mmdebstrap_and_no_set_up(debian: Machine) -> None:
    (debian.checkout / "tests/machines").mkdir(parents=True)
    (debian.checkout / "tests/machines/test-on").write_text('echo "test-on $*" >>"$CALLS"\n')
    assert debian.run("test-on", "debian13", "-k", "two words").returncode == 0
    lines = debian.calls_file.read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["apt-get", "apt-get", "test-on"]
    assert lines[1].endswith("--no-install-recommends mmdebstrap")
    assert lines[2] == "test-on debian13 -k two words"
    done = debian.run("--no-system", "test-on", "debian13")
    assert (done.returncode, "test-on needs mmdebstrap" in done.stderr) == (1, True)


def test_packages_take_mmdebstrap_and_no_set_up(debian: Machine) -> None:
    (debian.checkout / "tests/machines").mkdir(parents=True)
    (debian.checkout / "tests/machines/package").write_text('echo "package $*" >>"$CALLS"\n')
    assert debian.run("package", "debian12").returncode == 0
    lines = debian.calls_file.read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["apt-get", "apt-get", "package"]
    assert lines[2] == "package debian12"
    done = debian.run("--no-system", "package")
    assert (done.returncode, "package needs mmdebstrap" in done.stderr) == (1, True)


def test_dnf_installs_what_is_missing_and_only_that(fedora: Machine) -> None:
    (fedora.folder / "installed").write_text("nasm\n")
    assert fedora.run("setup").returncode == 0
    (install,) = fedora.calls("dnf")
    assert {"qemu-system-x86-core", "python3-libvirt"} <= set(install.split())
    assert "nasm" not in install.split()


def test_a_second_run_calls_no_package_manager_venv_or_pip(debian: Machine) -> None:
    assert debian.run("setup").returncode == 0
    calls = debian.calls("python")
    assert any(call.startswith("-m venv --clear --system-site-packages") for call in calls)
    assert any("-m pip install" in call and call.endswith("-e .[all,dev]") for call in calls)
    assert debian.run("setup").returncode == 0
    lines = debian.calls_file.read_text()
    assert "apt-get" not in lines
    assert "-m " not in lines


def test_a_changed_pyproject_updates_the_venv_without_making_it_anew(debian: Machine) -> None:
    debian.run("setup")
    debian.calls("python")
    (debian.checkout / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    debian.run("setup")
    calls = " ".join(debian.calls("python"))
    assert "-m pip install" in calls
    assert "-m venv" not in calls


def test_another_python_version_makes_the_venv_anew(debian: Machine) -> None:
    debian.run("setup")
    debian.calls("python")
    (debian.folder / "python-version").write_text("3.14.0\n")
    debian.run("setup")
    assert "-m venv" in " ".join(debian.calls("python"))


def test_a_failed_installation_is_tried_again(debian: Machine) -> None:
    fake = debian.bin / "python3"
    fake.write_text(
        fake.read_text().replace('case "$*" in', 'case "$*" in *"-m pip"*) exit 1 ;; esac\ncase "$*" in', 1)
    )
    assert "could not be installed" in debian.run("setup").stderr
    debian.calls("python")
    debian.run("setup")
    assert "-m pip install" in " ".join(debian.calls("python"))


def test_two_at_once_install_once(debian: Machine) -> None:
    fake = debian.bin / "python3"
    fake.write_text(
        fake.read_text().replace('case "$*" in', 'case "$*" in *"-m pip"*) sleep 0.2 ;; esac\ncase "$*" in', 1)
    )
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(debian.run, ("setup", "setup")))
    assert [done.returncode for done in both] == [0, 0]
    assert sum("-m pip install" in call for call in debian.calls("python")) == 1


def test_an_old_python_is_refused(debian: Machine) -> None:
    (debian.folder / "python-version").write_text("3.10.12\n")
    done = debian.run("setup")
    assert done.returncode == 1
    assert "is 3.10.12: Python 3.11 or later is needed" in done.stderr


def test_demo_passes_its_arguments_on_and_runs_where_it_was_called(debian: Machine, tmp_path: Path) -> None:
    done = debian.run("demo", "--keep", "x y", cwd=tmp_path)
    assert done.stdout == f"demo demo --keep x y in {tmp_path}\n"


def test_test_runs_the_gates_then_pytest_requiring_every_tool(debian: Machine) -> None:
    assert debian.run("test", "-k", "chain").returncode == 0
    lines = debian.calls_file.read_text().splitlines()
    assert lines[-2] == "gates"
    assert lines[-1].startswith("python tests/support/reaper.py ")
    assert lines[-1].endswith("/bin/python -m pytest --require=all -n auto --maxprocesses=4 --dist=loadfile -k chain")


def test_the_demo_installs_what_it_needs_alone(debian: Machine) -> None:
    assert debian.run("demo").returncode == 0
    (installed,) = [call for call in debian.calls("apt-get") if " install " in call]
    assert "qemu-system-x86" in installed.split()
    assert not {"openssh-server", "libvirt-clients", "shellcheck", "qemu-utils"} & set(installed.split())
    debian.run("test")
    assert any(".[all,dev]" in call for call in debian.calls("python"))  # the rest comes with the first test run
    debian.run("demo")
    assert not any("pip install" in call for call in debian.calls("python"))


def test_services_that_come_with_packages_are_left_disabled(debian: Machine) -> None:
    (debian.folder / "systemd").mkdir()
    enabled = debian.folder / "enabled"
    enabled.write_text("cron.service enabled enabled\n")
    script = (debian.bin / "apt-get").read_text()
    debian.script("apt-get", f'{script}\necho "ssh.service enabled enabled" >>"$MACHINE/enabled"\n')
    done = debian.run("setup")
    assert done.returncode == 0, done.stderr
    changed = {call for call in debian.calls("systemctl") if not call.startswith("list")}
    assert changed == {"disable --now ssh.service"}
    assert "left disabled: ssh.service" in done.stderr


def test_what_packages_print_goes_to_a_log(debian: Machine) -> None:
    script = (debian.bin / "apt-get").read_text()
    debian.script("apt-get", f"{script}\necho 'Unpacking a thousand things'\n")
    done = debian.run("setup")
    assert "Unpacking" not in done.stderr + done.stdout
    assert "Unpacking" in (debian.checkout / ".cache/bootstrap.log").read_text()
    (debian.folder / "installed").write_text("")
    (debian.folder / "broken").touch()
    debian.script("apt-get", "echo 'E: no space left'; exit 100\n")
    done = debian.run("setup")
    assert done.returncode == 1
    assert "E: no space left" in done.stderr  # its end, where it failed


def test_what_runs_a_service_is_unpacked_and_not_installed(debian: Machine) -> None:
    assert debian.run("setup").returncode == 0
    assert "prometheus" not in " ".join(debian.calls("apt-get")).split()
    assert debian.run("unpack").returncode == 0
    assert (debian.checkout / ".venv/oracles/usr/bin/promtool").is_file()
    assert [path.name for path in (debian.checkout / ".venv/oracles").iterdir()] == ["usr"]
    debian.calls("apt-get")
    assert debian.run("test").returncode == 0
    assert debian.calls("apt-get") == []  # once


def test_failed_gates_end_the_run(debian: Machine) -> None:
    (debian.folder / "bad-gates").touch()
    assert debian.run("test").returncode == 1
    assert "-m pytest" not in debian.calls_file.read_text()
    assert debian.run("lint").returncode == 1


@pytest.mark.parametrize("words", [("--no-system", "demo"), ("demo", "--no-system")])
def test_no_system_demo_gives_up_naming_what_it_cannot_do_without(debian: Machine, words: tuple[str, ...]) -> None:
    (debian.folder / "installed").write_text("python3-venv\nca-certificates\n")
    done = debian.run(*words)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("bootstrap: demo cannot work without: qemu-system-x86 ")
    assert "xfsprogs" not in done.stderr  # of use to the tests alone
    assert not (debian.checkout / ".venv").exists()
    assert debian.calls("apt-get") == []


def test_no_system_test_goes_on_without_requiring_the_missing_tools(debian: Machine) -> None:
    (debian.folder / "installed").write_text("python3-venv\nca-certificates\n")
    (debian.folder / "no-libvirt").touch()
    assert debian.run("--no-system", "test").returncode == 0
    calls = debian.calls("python")
    assert calls[-1].endswith(" -m pytest --require=none -n auto --maxprocesses=4 --dist=loadfile")
    assert any(call.endswith("-e .[harness,fast,dev]") for call in calls)


def test_without_root_and_sudo_it_says_what_to_do(debian: Machine) -> None:
    debian.script("id", "echo 1000\n")
    done = debian.run("test")
    assert done.returncode == 1
    assert "no sudo here" in done.stderr
    assert "./bootstrap --no-system test" in done.stderr


def test_a_user_installs_by_sudo_which_may_not_ask(debian: Machine) -> None:
    debian.script("id", "echo 1000\n")
    debian.script("sudo", 'echo "sudo $*" >>"$CALLS"\nshift\nexec "$@"\n')
    assert debian.run("setup").returncode == 0
    calls = debian.calls("sudo")
    assert len(calls) == 2
    assert all(call.startswith("-n env DEBIAN_FRONTEND=noninteractive ") for call in calls)


def test_a_failing_package_manager_ends_the_run(debian: Machine) -> None:
    (debian.folder / "broken").touch()
    done = debian.run("setup")
    assert done.returncode == 1
    assert "the system packages could not be installed" in done.stderr
    assert not (debian.checkout / ".venv").exists()


def test_an_unknown_distribution_goes_on_with_what_there_is(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "ID=arch\n")
    done = machine.run("setup")
    assert done.returncode == 0
    assert "neither Debian, Ubuntu nor Fedora" in done.stderr
    assert (machine.checkout / ".venv").is_dir()
