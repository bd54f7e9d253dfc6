"""docs/fleet.md to the letter: from a control node that has Ansible alone to hosts that had nothing of the program."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_vmdk_snap.domain import connection
from tests.domain.fleet.bed import Host, Switch, bed
from tests.domain.fleet.playbooks import Ansible, chosen_core
from tests.domain.lab import Lab
from tests.domain.libvirtd import obstacle

pytestmark = [
    pytest.mark.needs("libvirtd", "virsh", "ansible-playbook", "ssh", "sshd", "ssh-keygen", "ip", "sudo", "systemctl"),
    pytest.mark.timeout(900),
]
ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "fleet.md").read_text()
HOSTS_NEED = ("argcomplete", "deflate", "numpy")
"""What the program needs besides the distribution's packages; pip's index is the Internet for users only."""


@pytest.fixture(scope="module")
def network(scratch_root: Path) -> Iterator[tuple[Switch, list[Host]]]:
    if os.geteuid() != 0 or (reason := obstacle()):
        pytest.skip("hosts in namespaces need root" if os.geteuid() else str(reason))
    (scratch_root / "new").mkdir()
    with bed(scratch_root / "new", "hv1", "hv2", bare=("hv1", "hv2")) as made:
        yield made


def block(language: str, first: str) -> str:
    """Return the block of the page that begins with this line."""
    (text,) = re.findall(rf"```{language}\n({re.escape(first)}\n.*?)```", PAGE, re.DOTALL)
    return str(text)


def commands(first: str) -> list[str]:
    """Return the command lines of the console block that has this one."""
    (text,) = [found for found in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL) if first in found]
    return [line.removeprefix("$ ").partition("  #")[0].strip() for line in text.splitlines() if line.startswith("$ ")]


def wheel_of(name: str, folder: Path) -> None:
    """Make a wheel of a distribution that is installed here, without its tests."""
    found = importlib.metadata.distribution(name)
    (info,) = {path.parts[0] for path in found.files or [] if path.parts[0].endswith(".dist-info")}
    tags = re.findall(r"^Tag: (\S+)", found.read_text("WHEEL") or "", re.MULTILINE)
    with zipfile.ZipFile(folder / f"{info.removesuffix('.dist-info')}-{tags[0]}.whl", "w") as wheel:
        for path in found.files or []:
            if ".." not in path.parts and path.suffix != ".pyc" and "tests" not in path.parts:
                wheel.write(str(path.locate()), str(path))


def make_index(folder: Path) -> None:
    """Put what a host would fetch from the Internet into a folder."""
    folder.mkdir()
    for name in HOSTS_NEED:
        wheel_of(name, folder)


def make_project(folder: Path) -> None:
    """Put what a checkout has of the program and the collection into `folder`, and its wheel into `dist`."""
    source = folder / "source"
    for name in ("qemu_vmdk_snap", "contrib", "docs", "examples", "guests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder / "dist", source], check=True)
    shutil.copytree(ROOT / "contrib", folder / "contrib")
    shutil.copytree(ROOT / "ansible", folder / "ansible", symlinks=True)


def control_node(folder: Path, hosts: list[Host], switch: Switch) -> Ansible:
    """Return a control node that has Ansible, the checkout, the page's files, and what ssh needs."""
    ansible = Ansible(folder, chosen_core("current"), switch.inside(), collection=False)
    make_project(folder)
    (folder / "hypervisors").write_text(block("ini", "# hypervisors").replace("# hypervisors\n", ""))
    (folder / "site.yml").write_text(block("yaml", "# site.yml"))
    names = "".join(f"Host {one.name}\nHostName {one.address}\n" for one in hosts)
    (folder / "ssh_config").write_text(f"{names}Host *\n{(hosts[0].keys / 'ssh_config').read_text()}")
    (folder / "group_vars").mkdir()
    words = f"ansible_ssh_common_args: -F {folder}/ssh_config\nansible_ssh_private_key_file: {hosts[0].keys}/key\n"
    (folder / "group_vars" / "all.yml").write_text(words)
    return ansible


def run(ansible: Ansible, line: str) -> str:
    done = ansible.run(*shlex.split(line))
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_the_page_works_from_an_empty_control_node(network: tuple[Switch, list[Host]], scratch: Path) -> None:
    switch, hosts = network
    ansible = control_node(scratch / "c", hosts, switch)
    make_index(scratch / "index")
    for one in hosts:
        one.root("etc/pip.conf").write_text(
            f"[global]\nno-index = true\nfind-links = {scratch}/index\nno-compile = true\n"
        )
        with connection(one.uri) as conn:
            disk = Lab(conn, one.images, one.uri).disk("web1")
            conn.defineXML(
                "<domain type='qemu'><name>web1</name><memory unit='MiB'>32</memory><os><type>hvm</type></os><devices>"
                f"<disk type='file' device='disk'><driver name='qemu' type='vmdk'/><source file='{disk}'/>"
                "<target dev='vda' bus='virtio'/></disk></devices></domain>"
            )
        assert one.run("sh", "-c", "command -v qemu-vmdk-snap").stdout == ""
    pip, *install = commands("collection build")
    assert pip == "pip install ansible-core"
    said = [run(ansible, line) for line in install]
    assert "Brings the snapshots of a libvirt domain" in said[-1]  # ansible-doc
    site, ask, nightly = commands("ansible-playbook -i hypervisors site.yml")
    assert re.search(r"^hv1 .* changed=[1-9]", run(ansible, site), re.MULTILINE)
    for one in hosts:
        assert_installed(one)
    second = run(ansible, site)
    assert re.findall(r"^hv\d .* changed=(\d+) .* failed=(\d+)", second, re.MULTILINE) == [("0", "0")] * 2, second
    asked = run(ansible, ask)
    assert asked.count('"changed": true') == 2, asked
    for one in hosts:
        assert one.run("qemu-vmdk-snap", "snapshot", "list", "web1", "--name").stdout.split() == []
    run(ansible, nightly)
    for one in hosts:
        (name,) = one.run("qemu-vmdk-snap", "snapshot", "list", "web1", "--name").stdout.split()
        assert name.startswith("nightly-")


def assert_installed(host: Host) -> None:
    """The program, its hook, the policy, the timers and what they read are there."""
    assert host.run("/usr/local/bin/qemu-vmdk-snap", "--version").returncode == 0
    status = host.run("qemu-vmdk-snap", "hook", "status")
    assert status.returncode == 0, status.stdout + status.stderr
    assert 'verify = "chain"' in host.root("etc/qemu-vmdk-snap/domains/web1.toml").read_text()
    assert "KEEP=--keep-hourly=24 --keep-daily=7\n" in host.root("etc/qemu-vmdk-snap/scheduled/web1.conf").read_text()
    units = host.root("etc/systemd/system")
    for unit in (ROOT / "contrib" / "systemd").glob("qemu-vmdk-snap@.*"):
        assert (units / unit.name).read_bytes() == unit.read_bytes()
    timers = {"qemu-vmdk-snap@web1.timer", "qemu-vmdk-snap-metrics.timer"}
    assert timers <= {path.name for path in (units / "timers.target.wants").iterdir()}
    # No systemd runs here to start the timers; what the service runs does.
    words = dict(line.split("=", 1) for line in host.root("etc/qemu-vmdk-snap/metrics.conf").read_text().splitlines())
    host.root(words["TEXTFILE"].lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
    assert host.run("qemu-vmdk-snap", "metrics", "--textfile", words["TEXTFILE"]).returncode == 0
    assert 'qemu_vmdk_snap_domain_snapshots{domain="web1"} 0' in host.root(words["TEXTFILE"].lstrip("/")).read_text()
