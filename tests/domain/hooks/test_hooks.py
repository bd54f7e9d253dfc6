"""The hook as libvirt runs it, without libvirt: a process that gets a domain's XML and says yes or no."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_vmdk_snap import InvalidRequest, create_image, create_overlay, open_chain, recover
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain.hooks import install as hooks
from qemu_vmdk_snap.domain.hooks import policy

MIB = 1 << 20


class Host:
    """A folder of hooks, one of policies, and one with a domain's chain of two."""

    def __init__(self, folder: Path) -> None:
        self.hooks, self.policies, self.images = folder / "qemu.d", folder / "domains", folder / "images"
        self.images.mkdir()
        self.script = hooks.install(self.hooks, self.policies, {})
        self.base, self.overlay = self.images / "a.vmdk", self.images / "a-000001.vmdk"
        create_image(self.base, 64 * MIB, durable=False)
        write(self.base, b"base")
        create_overlay(self.overlay, self.base, durable=False)
        write(self.overlay, b"work of a run")

    def policy(self, text: str, domain: str = "d1") -> Path:
        path = self.policies / f"{domain}.toml"
        path.write_text(text)
        return path

    def call(self, *words: str, xml: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run the hook in libvirt's way: next to no environment."""
        text = self.xml() if xml is None else xml
        return subprocess.run(
            [self.script, *words],
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={"PATH": "/usr/bin:/bin", "HOME": "/root", "LC_ALL": "C"},
        )

    def xml(self, chain: str | None = None, kind: str = "vmdk", source: str | None = None) -> str:
        chain = f"<source file='{self.base}'/><backingStore/>" if chain is None else chain
        source = source or f"<source file='{self.overlay}'/>"
        return (
            "<domain type='qemu' id='7'><name>d1</name><devices>"
            f"<disk type='{'volume' if 'pool' in source else 'file'}' device='disk'><driver type='{kind}'/>{source}"
            f"<backingStore type='file'><format type='vmdk'/>{chain}</backingStore>"
            "<target dev='vda' bus='virtio'/></disk></devices></domain>"
        )


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def write(path: Path, data: bytes, offset: int = 0) -> None:
    with open_chain(path, writable=True) as chain:
        chain.write_at(offset, data.ljust(512, b"."))


def read(path: Path) -> bytes:
    with open_chain(path) as chain:
        return chain.read_at(0, 512).rstrip(b".")


START = ("prepare", "begin", "-")


@pytest.mark.parametrize(
    "event", [START, ("start", "begin", "-"), ("reconnect", "begin", "-"), ("release", "end", "-"), ()]
)
def test_a_domain_without_a_policy_is_let_through_whatever_its_xml(host: Host, event: tuple[str, ...]) -> None:
    host.policy("verify = ", "other")
    done = host.call("d1", *event, xml="no xml")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_at_reconnect_it_is_0_whatever_happens(host: Host) -> None:
    host.policy("this is [no TOML")
    host.base.unlink()
    for operation in ("reconnect", "start", "started", "attach", "migrate", "restore"):
        done = host.call("d1", operation, "begin", "-", xml="")
        assert (done.returncode, done.stderr) == (0, "")
    assert host.call("d1", "stopped", "end", "-").returncode == 0
    assert host.call("d1", "release", "end", "-").returncode == 0


def test_a_whole_chain_starts(host: Host) -> None:
    for verify in ("chain", "deep"):
        host.policy(f'verify = "{verify}"')
        done = host.call("d1", *START)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.needs("qemu-img")
@pytest.mark.parametrize("kind", ["vmdk", "qcow2"])
def test_a_top_with_an_overlay_on_it_is_not_started(host: Host, kind: str) -> None:
    """As after `dumpxml` of a running domain and `define`: the guest would write into a frozen file."""
    above = host.images / "a-000002.x"
    if kind == "vmdk":
        create_overlay(above, host.overlay, durable=False)
    else:
        words = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(host.overlay), "-F", "vmdk", str(above)]
        subprocess.run(words, check=True)
    host.policy('verify = "chain"')
    done = host.call("d1", *START)
    assert done.returncode == 1
    assert f"{host.overlay} backs {above}, which would read what the guest writes: `doctor d1` says" in done.stderr
    above.unlink()
    assert host.call("d1", *START).returncode == 0


def test_a_parent_in_a_folder_of_its_own_needs_the_policy(host: Host) -> None:
    other = host.images.parent / "bases"
    other.mkdir()
    base, top = other / "b.vmdk", host.images / "b-000001.vmdk"
    create_image(base, MIB, durable=False)
    create_overlay(top, base, durable=False)
    text = host.xml(source=f"<source file='{top}'/>")
    start, end = text.index("<backingStore"), text.index("<target")
    text = text[:start] + text[end:]  # the XML does not name the folder either
    host.policy('verify = "chain"')
    done = host.call("d1", *START, xml=text)
    assert done.returncode == 1
    assert f"allow {other} (trusted-dirs, in its policy) to follow it" in done.stderr
    host.policy(f'verify = "chain"\ntrusted-dirs = ["{other}"]')
    assert host.call("d1", *START, xml=text).returncode == 0


def remove_base(host: Host) -> None:
    host.base.unlink()


def write_base(host: Host) -> None:
    write(host.base, b"changed below the overlay")


def break_xml(host: Host) -> None:
    other = host.images / "other.vmdk"
    shutil.copyfile(host.base, other)
    host.xml = lambda *_args: Host.xml(host, chain=f"<source file='{other}'/><backingStore/>")  # type: ignore[method-assign]


def use_volume(host: Host) -> None:
    host.xml = lambda *_args: Host.xml(host, source="<source pool='p' volume='v'/>")  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove_base, "its parent 'a.vmdk' does not exist"),
        (write_base, "the parent was modified after the overlay was made"),
        (break_xml, "domain d1: disk vda: the chain in its XML differs from that of its files: other.vmdk"),
        (use_volume, "domain d1: disk vda is a volume, and a hook cannot ask libvirt for its file"),
    ],
)
def test_a_broken_chain_is_refused_in_one_line(host: Host, damage: Callable[[Host], None], reason: str) -> None:
    host.policy('verify = "chain"\nrevert-on-start = true')
    damage(host)
    before = host.overlay.read_bytes()
    done = host.call("d1", *START)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("qemu-vmdk-snap: domain d1: ")
    assert done.stderr.count("\n") == 1
    assert reason in done.stderr
    assert host.overlay.read_bytes() == before


def test_deep_sees_what_chain_does_not(host: Host) -> None:
    raw = bytearray(host.base.read_bytes())
    gd = int.from_bytes(raw[56:64], "little") * 512
    table = int.from_bytes(raw[gd : gd + 4], "little") * 512
    raw[table : table + 4] = (0x7FFF_FFF0).to_bytes(4, "little")  # a grain far behind the end of the file
    host.base.write_bytes(raw)
    host.policy('verify = "chain"')
    assert host.call("d1", *START).returncode == 0
    host.policy('verify = "deep"')
    done = host.call("d1", *START)
    assert done.returncode == 1
    assert "errors in its chain: " in done.stderr
    assert str(host.base) in done.stderr


@pytest.mark.parametrize("words", ["true", '["vda"]'])
def test_the_overlay_is_renewed_at_a_start(host: Host, words: str) -> None:
    host.policy(f"revert-on-start = {words}")
    assert read(host.overlay) == b"work of a run"
    done = host.call("d1", *START)
    assert (done.returncode, done.stderr) == (0, "")
    assert read(host.overlay) == b"base"
    assert sorted(path.name for path in host.images.iterdir()) == ["a-000001.vmdk", "a.vmdk"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("verify = ", "is not TOML: "),
        ('verify = "depp"', "verify = 'depp' must be one of no, chain, deep"),
        ("verifi = true", "'verifi' is not known"),
        ("deadline = 0", "deadline = 0 must be seconds"),
        ("keep-last = 3", "keep-last needs snapshot-after-stop"),
        ("snapshot-after-stop = true\nkeep-last = -1", "keep-last = -1 must be a number from 1 on"),
        ("snapshot-after-stop = true\nrevert-on-start = true", "exclude each other"),
        ('trusted-dirs = ["images"]', "must be a list of absolute paths"),
        ("revert-on-start = []", "must be true, false or a list of disks"),
        ('revert-on-start = ["vdb"]', "revert-on-start names vdb, which is not a disk of the domain"),
    ],
)
def test_a_policy_that_cannot_be_followed_refuses_the_start(host: Host, text: str, reason: str) -> None:
    path = host.policy(text)
    done = host.call("d1", *START)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"qemu-vmdk-snap: domain d1: {path}" in done.stderr
    assert reason in done.stderr


def test_a_parent_elsewhere_needs_to_be_trusted(host: Host, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    overlay = elsewhere / "o.vmdk"
    create_overlay(overlay, host.base, durable=False)
    bare = host.xml(source=f"<source file='{overlay}'/>").replace("<backingStore type='file'>", "<x>")
    bare = bare.replace("</backingStore><target", "</x><target")
    host.policy('verify = "chain"')
    assert f"allow {host.images}" in host.call("d1", *START, xml=bare).stderr
    host.policy(f'verify = "chain"\ntrusted-dirs = ["{host.images}"]')
    assert host.call("d1", *START, xml=bare).returncode == 0


def test_a_start_in_use_is_refused(host: Host) -> None:
    host.policy("revert-on-start = true")
    with open_chain(host.overlay):
        done = host.call("d1", *START)
    assert done.returncode == 1
    assert "is another process using the image?" in done.stderr
    assert read(host.overlay) == b"work of a run"


def test_a_deadline_ends_it(host: Host) -> None:
    host.policy('verify = "chain"\ndeadline = 0.3')
    with subprocess.Popen(
        [host.script, "d1", *START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        line = process.stderr.read()  # standard input stays open: the hook waits for the XML
        assert process.wait(60) == 1
    assert line == "qemu-vmdk-snap: domain d1: the deadline of 0.3 s has passed\n"


def test_killed_at_any_moment_it_leaves_the_old_overlay_or_the_new_one(host: Host) -> None:
    host.policy("revert-on-start = true")
    chance = random.Random(2006)
    seen = set()
    for _ in range(25):
        recover(host.images)
        write(host.overlay, b"work of a run")
        with subprocess.Popen([host.script, "d1", *START], stdin=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            process.stdin.write(host.xml())
            process.stdin.close()
            time.sleep(chance.uniform(0.03, 0.12))
            process.kill()
            process.wait()
        seen.add(read(host.overlay))
        assert seen <= {b"work of a run", b"base"}
    assert host.call("d1", *START).returncode == 0
    assert read(host.overlay) == b"base"
    assert sorted(path.name for path in host.images.iterdir()) == ["a-000001.vmdk", "a.vmdk"]


def test_no_numpy_no_site_in_a_start(host: Host) -> None:
    host.policy('verify = "chain"\nrevert-on-start = true')
    text = host.script.read_text().replace(" -I -S ", " -I -S -X importtime ")
    host.script.write_text(text)
    done = host.call("d1", *START)
    assert done.returncode == 0
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "qemu_vmdk_snap.vmdk.sparse.clear" in loaded  # below `ops.renew`, whose own import is not told
    assert len(loaded) < 190, "a guest's start waits for what is imported here"
    assert not loaded & {
        "numpy",
        "site",
        "libvirt",
        "argparse",
        "subprocess",
        "logging",
        "urllib.request",
        "secrets",
    }


def test_install_is_of_use_again_and_again(tmp_path: Path) -> None:
    folder, policies = tmp_path / "hooks" / "qemu.d", tmp_path / "p"
    path = hooks.install(folder, policies, {"QEMU_VMDK_SNAP_STATE": "/with a space", "HOME": "/x"})
    assert path.stat().st_mode & 0o777 == 0o755
    assert "export QEMU_VMDK_SNAP_STATE='/with a space'\n" in path.read_text()
    assert "HOME" not in path.read_text()
    state = hooks.status(folder)
    assert (state.installed, state.current, state.problem, state.policies) == (True, True, None, ())
    hooks.install(folder, policies, {})
    assert "export" not in path.read_text()
    assert [entry.name for entry in folder.iterdir()] == [hooks.NAME]
    assert hooks.uninstall(folder)
    assert not folder.exists()
    assert not hooks.uninstall(folder)


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    folder = tmp_path / "qemu.d"
    folder.mkdir()
    theirs = folder / hooks.NAME
    theirs.write_text("#!/bin/sh\nexit 0\n")
    for call in (lambda: hooks.install(folder, tmp_path / "p", {}), lambda: hooks.uninstall(folder)):
        with pytest.raises(InvalidRequest, match="was not installed by this program"):
            call()
    assert theirs.read_text() == "#!/bin/sh\nexit 0\n"
    theirs.unlink()
    other = folder / "10-other"
    other.write_text("")
    hooks.install(folder, tmp_path / "p", {})
    hooks.uninstall(folder)
    assert list(folder.iterdir()) == [other]
    other.unlink()
    hooks.install(folder, tmp_path / "p", {})
    hooks.uninstall(folder)
    assert folder.is_dir()  # it was there before


def test_status_tells_what_is_wrong(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.policy("keep-last = 1", "bad")
    host.policy('verify = "deep"\nconnect = "qemu+unix:///system?socket=/nowhere"', "good")
    assert policy.load(host.policies / "good.toml").deadline == policy.DEEP_DEADLINE
    assert main(["hook", "status", "--dir", str(host.hooks), "--output=json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["version"] is not None
    assert [(entry["domain"], bool(entry["problem"])) for entry in shown["policies"]] == [
        ("bad", True),
        ("good", False),
    ]
    (host.policies / "bad.toml").unlink()
    assert main(["hook", "status", "--dir", str(host.hooks)]) == 0
    assert "Policy of domain good: " in capsys.readouterr().out
    (host.policies / "good.toml").chmod(0o666)
    assert "may be written by others" in str(hooks.status(host.hooks).policies[0].problem)
    host.script.chmod(0o644)
    assert hooks.status(host.hooks).problem == "is not executable: libvirt ignores it"
    host.script.chmod(0o775)
    assert "may be written by others" in str(hooks.status(host.hooks).problem)
    assert main(["hook", "uninstall", "--dir", str(host.hooks)]) == 0
    assert main(["hook", "status", "--dir", str(host.hooks)]) == 1


def test_without_its_interpreter_it_says_so_and_only_a_start_is_refused(host: Host) -> None:
    host.policy("verify = false")
    text = host.script.read_text()
    gone = "/gone/$(touch ran) python3"
    host.script.write_text(text.replace(f"python={shlex.quote(sys.executable)}\n", f"python={shlex.quote(gone)}\n"))
    done = host.call("d1", *START)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"{gone} is gone: install the hook again" in done.stderr
    assert host.call("d1", "release", "end", "-").returncode == 0
    assert host.call("d1", "reconnect", "begin", "-").returncode == 0
    assert hooks.status(host.hooks).problem == f"needs {gone}, which is gone: install it again"
