"""The pytest plugin, seen at work: a pytest of its own on a small folder of tests that somebody else could have."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qemu_vmdk_snap.harness import CONTROLLERS
from qemu_vmdk_snap.harness.chains import CREATABLE
from qemu_vmdk_snap.ops.make.layout import KINDS

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.needs("qemu-system-x86_64")

READS = """
def test_reads(vmdk_chain, vmdk_guest):
    chain = vmdk_chain.base("4M").write("1M", b"in the base").snapshot().write("1M", b"overlay")
    guest = vmdk_guest(chain)
    assert guest.assert_reads() > 0
    guest.power_off()
"""

BAD = """
def test_hangs(vmdk_chain, vmdk_guest):
    chain = vmdk_chain.base("4M").write(0, b"\\xfa\\xf4".ljust(510, b"\\0") + b"\\x55\\xaa")
    vmdk_guest(chain, from_disk=True)
"""


def run(pytester: pytest.Pytester, text: str, *options: str, path: str | None = None) -> pytest.RunResult:
    pytester.makepyfile(text)
    pytester.makeini("[pytest]\naddopts = --strict-markers -p no:cacheprovider -p no:hypothesispytest\n")
    with pytest.MonkeyPatch.context() as patch:
        if path is not None:
            patch.setenv("PATH", path)
        return pytester.runpytest_subprocess("--basetemp", str(pytester.path / "t"), "-rA", *options)


def logs(pytester: pytest.Pytester) -> set[str]:
    return {path.name for path in (pytester.path / "t").rglob("guests/guest*/*")}


def test_a_chain_and_a_guest(pytester: pytest.Pytester) -> None:
    result = run(pytester, READS)
    result.assert_outcomes(passed=1)
    assert not logs(pytester)


def test_logs_are_kept_where_they_are_wanted(pytester: pytest.Pytester) -> None:
    run(pytester, READS, "--guest-keep").assert_outcomes(passed=1)
    assert logs(pytester) >= {"serial.log", "qmp.log", "firmware.log", "command"}
    run(pytester, READS, "--guest-keep", "--guest-log-dir", "here", "--guest-timeout-scale=2").assert_outcomes(passed=1)
    (folder,) = (pytester.path / "here").iterdir()
    assert folder.name == "test_logs_are_kept_where_they_are_wanted.py-test_reads"
    assert (folder / "guest1/serial.log").read_bytes().startswith(b"00 ok probe")
    text = READS + "    assert '..' not in guest.folder.parts\n"
    run(pytester, text, "--guest-keep", "--guest-log-dir", "here/../there").assert_outcomes(passed=1)
    assert (pytester.path / "there").is_dir()


def test_a_guest_that_hangs_is_one_error_of_the_tests_own_line(pytester: pytest.Pytester) -> None:
    result = run(pytester, BAD)
    result.assert_outcomes(failed=1)
    text = result.stdout.str()
    assert ">       vmdk_guest(chain, from_disk=True)" in text or ">   " in text
    assert text.count("Error: guest base.vmdk: waiting for the probe's first line: the guest hangs") >= 1
    assert "During handling of the above exception" not in text
    assert "direct cause of the following exception" not in text
    for part in ("firmware, last", "QMP, last", "the chain as the host reads it", "run it again"):
        assert text.count(f"--- {part}") == 1, part
    frames = set(re.findall(r"^(\S+\.py):\d+: ", text, re.MULTILINE))
    assert frames == {"test_a_guest_that_hangs_is_one_error_of_the_tests_own_line.py"}
    assert logs(pytester) >= {"report.txt"}


def test_a_tests_own_failure_has_the_report_of_its_guests(pytester: pytest.Pytester) -> None:
    text = """
def test_a(vmdk_chain, vmdk_guest):
    with vmdk_guest(vmdk_chain.of_depth(2, "4M")) as guest:
        assert guest.probe.size() == 5 << 20
"""
    result = run(pytester, text)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*guest 1.vmdk*", "guest report: the test failed: AssertionError", "00 ok probe *"])
    assert logs(pytester) >= {"report.txt"}


def test_wrong_content_is_told_at_the_tests_own_line(pytester: pytest.Pytester) -> None:
    text = """
def test_a(vmdk_chain, vmdk_guest):
    chain = vmdk_chain.base("4M").write("1M", b"written")
    raw = chain.top.read_bytes()
    chain.top.write_bytes(raw.replace(b"written", b"damaged"))
    vmdk_guest(chain).assert_reads()
"""
    result = run(pytester, text)
    result.assert_outcomes(failed=1)
    shown = result.stdout.str()
    assert "sector 2048 (byte 0x100000) reads something else than was written, from byte 0x100000 on" in shown
    assert set(re.findall(r"^(\S+\.py):\d+: ", shown, re.MULTILINE)) == {
        "test_wrong_content_is_told_at_the_tests_own_line.py"
    }


def test_marks_make_a_test_of_each_value(pytester: pytest.Pytester) -> None:
    text = """
import pytest

@pytest.mark.vmdk_kinds("vmfsSparse", "monolithicFlat")
@pytest.mark.vmdk_depths(1, 2)
def test_chain(vmdk_chain, vmdk_kind):
    chain = vmdk_chain.of_depth(size="1M")
    assert vmdk_kind.encode() in chain.at(0).path.read_bytes()

@pytest.mark.vmdk_controllers("virtio-blk", "ide")
@pytest.mark.vmdk_machines("q35")
@pytest.mark.vmdk_accelerators("tcg")
def test_guest(vmdk_chain, vmdk_guest, vmdk_controller):
    with vmdk_guest(vmdk_chain.base("1M").write(0, b"x")) as guest:
        guest.assert_reads()
        assert (guest.setup.controller, guest.setup.machine) == (vmdk_controller, "q35")
        assert guest.setup.accelerator == "tcg"

@pytest.mark.vmdk_kinds("all")
def test_all(vmdk_kind): pass
"""
    result = run(pytester, text)
    result.assert_outcomes(passed=4 + 2 + len(CREATABLE))
    assert "test_chain[1-vmfsSparse]" in result.stdout.str() or "test_chain[vmfsSparse-1]" in result.stdout.str()


def test_a_kvm_that_boots_no_guest_is_skipped_as_a_missing_one(pytester: pytest.Pytester) -> None:
    text = """
import pytest
from qemu_vmdk_snap.harness import accelerator
accelerator.kvm_fault = lambda: "KVM boots no guest"

@pytest.mark.vmdk_accelerators("all")
def test_guest(vmdk_chain, vmdk_guest, vmdk_accelerator):
    assert vmdk_guest(vmdk_chain.base("1M")).setup.accelerator == vmdk_accelerator
"""
    result = run(pytester, text)
    result.assert_outcomes(passed=1, skipped=1)
    assert "kvm: KVM boots no guest" in result.stdout.str()
    run(pytester, text, "--guest-require").assert_outcomes(passed=1, errors=1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "@pytest.mark.vmdk_depths(2)\ndef test_a(): pass",
            "mark vmdk_depths, but the test uses neither vmdk_depth nor",
        ),
        ("@pytest.mark.vmdk_kinds()\ndef test_a(vmdk_chain): pass", "mark vmdk_kinds names no values"),
    ],
)
def test_a_mark_that_means_nothing_is_refused(pytester: pytest.Pytester, text: str, words: str) -> None:
    result = run(pytester, f"import pytest\n{text}\n")
    assert result.ret != 0
    assert words in result.stdout.str() + result.stderr.str()
    assert "plugin.py" not in result.stdout.str()
    assert "pluggy/" not in result.stdout.str()


@pytest.mark.parametrize("scale", ["0", "-1", "x", "inf", "nan"])
def test_a_scale_that_is_none_is_refused_in_one_line(pytester: pytest.Pytester, scale: str) -> None:
    result = run(pytester, READS, f"--guest-timeout-scale={scale}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.stderr.lines[0] == f"ERROR: --guest-timeout-scale: {scale!r}: must be a number above 0"


REFUSED = """
import pytest
from qemu_vmdk_snap import open_chain

def test_outside(vmdk_chain):
    vmdk_chain.base("1M").write("1M", b"x")

def test_kind(vmdk_chain):
    vmdk_chain.base("1M", kind="none")

@pytest.fixture
def stale(vmdk_chain):
    chain = vmdk_chain.of_depth(2, "1M")
    with open_chain(chain.at(0).path, writable=True) as opened:
        opened.write_at(0, b"x")
    return chain

@pytest.fixture
def guest(vmdk_guest, stale):
    return vmdk_guest(stale)

def test_cid(vmdk_guest, stale):
    vmdk_guest(stale)

def test_cid_in_a_fixture(guest): pass
"""


def test_what_is_refused_is_shown_at_the_tests_own_line(pytester: pytest.Pytester) -> None:
    result = run(pytester, REFUSED)
    result.assert_outcomes(failed=3, errors=1)
    text = result.stdout.str()
    assert set(re.findall(r"^(\S+\.py):\d+: ", text, re.MULTILINE)) == {
        "test_what_is_refused_is_shown_at_the_tests_own_line.py"
    }
    assert "Traceback" not in text
    for line in ('vmdk_chain.base("1M").write("1M", b"x")', 'vmdk_chain.base("1M", kind="none")', "vmdk_guest(stale)"):
        assert f">       {line}" in text or f">   {line}" in text
    assert "_pytest/" not in text
    full = run(pytester, REFUSED, "--full-trace").stdout.str()
    assert "chain/links.py:" in full


def test_all_controllers_are_those_that_the_guests_can_have(pytester: pytest.Pytester) -> None:
    text = """
import pytest

@pytest.mark.vmdk_controllers("all")
class Test:
    def test_probe(self, vmdk_guest): pass
    def test_linux(self, vmdk_linux): pass
    def test_domain(self, vmdk_domain): pass
    def test_both(self, vmdk_linux, vmdk_domain, vmdk_controller): pass
"""
    shown = run(pytester, text, "--collect-only", "-q").stdout.str()
    named: dict[str, set[str]] = {}
    for test, value in re.findall(r"::test_(\w+)\[(\S+)\]", shown):
        named.setdefault(test, set()).add(value)
    assert named == {
        "probe": set(CONTROLLERS),
        "linux": set(CONTROLLERS) - {"lsi"},
        "domain": {"ide", "ahci", "virtio-blk", "virtio-scsi"},
        "both": {"ide", "ahci", "virtio-blk", "virtio-scsi"},
    }


def test_a_linux_alone_takes_the_controller_of_the_mark(pytester: pytest.Pytester) -> None:
    text = """
import pytest

@pytest.mark.vmdk_controllers("virtio-scsi", "ide")
def test_marked(vmdk_chain, vmdk_linux, request):
    with vmdk_linux(vmdk_chain.base("4M")) as guest:
        assert guest.machine.setup.controller in request.node.name

def test_unmarked(vmdk_chain, vmdk_linux):
    with vmdk_linux(vmdk_chain.base("4M")) as guest:
        assert guest.machine.setup.controller == "virtio-blk"
"""
    run(pytester, text).assert_outcomes(passed=3)


def test_every_kind_that_can_be_created_can_be_marked() -> None:
    assert set(CREATABLE) == set(KINDS)


def test_without_qemu_it_skips_with_the_reason_or_fails(pytester: pytest.Pytester, tmp_path: Path) -> None:
    reason = "qemu-system-x86_64: is not installed (Debian: qemu-system-x86, Fedora: qemu-system-x86-core)"
    result = run(pytester, READS, path=str(tmp_path))
    result.assert_outcomes(skipped=1)
    assert reason in result.stdout.str()
    result = run(pytester, READS, "--guest-require", path=str(tmp_path))
    result.assert_outcomes(errors=1)
    assert f"required: {reason}" in result.stdout.str()
    for words in ("Traceback", "traceback", "During handling"):
        assert words not in result.stdout.str()


def test_without_pexpect_it_skips_with_the_reason(pytester: pytest.Pytester) -> None:
    result = run(pytester, "import sys\nsys.modules['pexpect'] = None\n" + READS)
    result.assert_outcomes(skipped=1)
    assert "pexpect: is not installed (pip install 'qemu-vmdk-snap[harness]')" in result.stdout.str()


def test_several_processes_share_nothing(pytester: pytest.Pytester) -> None:
    many = "import pytest\n\n@pytest.mark.parametrize('n', range(4))\n" + READS.replace("(vmdk", "(n, vmdk")
    run(pytester, many, "-n", "2").assert_outcomes(passed=4)


def test_a_guest_that_fails_is_left_running_where_that_is_wanted(pytester: pytest.Pytester) -> None:
    result = run(pytester, BAD, "--guest-pdb")
    text = result.stdout.str()
    found = re.search(r"the guest still runs, process (\d+); its console: socat -,rawer UNIX-CONNECT:(\S+);", text)
    assert found is not None, text
    pid = int(found[1])
    try:
        assert Path(found[2]).is_socket()
        assert b"qemu-system" in Path(f"/proc/{pid}/cmdline").read_bytes()
    finally:
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        shutil.rmtree(Path(found[2]).parent)
        while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.needs("libvirt")
def test_a_domain_in_the_tests_own_process(pytester: pytest.Pytester) -> None:
    text = """
from qemu_vmdk_snap.domain import create_snapshot, list_snapshots

def test_a(vmdk_chain, vmdk_domain, vmdk_libvirt):
    chain = vmdk_chain.of_depth(3, "4M")
    domain = vmdk_domain(chain).start()
    assert domain.assert_reads() > 0
    domain.shut_off()
    create_snapshot(vmdk_libvirt, domain.name, "one")
    assert [one.name for one in list_snapshots(vmdk_libvirt, domain.name)] == ["one"]
    domain.start()
    domain.probe.assert_reads(chain.model)
"""
    run(pytester, text).assert_outcomes(passed=1)


@pytest.mark.needs("libvirt")
def test_a_domain_on_each_bus(pytester: pytest.Pytester) -> None:
    text = """
import pytest

@pytest.mark.vmdk_controllers("ide", "ahci", "virtio-blk", "virtio-scsi")
def test_a(vmdk_chain, vmdk_domain):
    assert vmdk_domain(vmdk_chain.of_depth(2, "4M")).start().assert_reads() > 0
"""
    run(pytester, text).assert_outcomes(passed=4)


@pytest.mark.needs("libvirt")
def test_a_domain_on_a_stale_chain_is_not_started(pytester: pytest.Pytester) -> None:
    text = """
import pytest
from qemu_vmdk_snap import CidMismatch, open_chain
from qemu_vmdk_snap.domain import create_snapshot

def spoil(chain):
    with open_chain(chain.at(0).path, writable=True) as opened:
        opened.write_at(0, b"x")

def test_a(vmdk_chain, vmdk_domain, vmdk_libvirt):
    chain = vmdk_chain.of_depth(2, "4M")
    one, two = vmdk_domain(chain), vmdk_domain(str(chain.top))
    create_snapshot(vmdk_libvirt, two.name, "one")
    spoil(chain)
    for domain in (one, two):
        with pytest.raises(CidMismatch, match="the parent was modified after the overlay was made"):
            domain.start()
        assert not domain.domain.isActive()
    vmdk_domain(chain, check_cids=False).start()
"""
    run(pytester, text).assert_outcomes(passed=1)


@pytest.mark.needs("libvirt")
def test_a_domain_that_cannot_answer_says_why(pytester: pytest.Pytester) -> None:
    text = """
import contextlib, os, pathlib, signal
import pytest
from qemu_vmdk_snap import GuestError

def qemu_of(domain):
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes()
            if b"qemu-system" in words.split(b"\\0")[0] and os.fsencode(domain.folder) in words:
                return int(path.parent.name)

def fails(domain):
    with pytest.raises(GuestError) as caught:
        domain.assert_reads()
    assert type(caught.value) is GuestError
    assert caught.value.guest == domain.name
    return caught.value.reason

def test_paused(vmdk_chain, vmdk_domain):
    domain = vmdk_domain(vmdk_chain.base("4M")).start()
    domain.domain.suspend()
    assert fails(domain) == "waiting for the answer to 'size': the domain is paused (user)"
    domain.domain.resume()
    assert domain.assert_reads() > 0

def test_destroyed(vmdk_chain, vmdk_domain):
    domain = vmdk_domain(vmdk_chain.base("4M")).start()
    domain.domain.destroy()
    assert fails(domain).endswith(": its serial line was closed: the domain is shut off (destroyed)")

def test_killed(vmdk_chain, vmdk_domain):
    domain = vmdk_domain(vmdk_chain.base("4M")).start()
    domain.domain.suspend()
    os.kill(qemu_of(domain), signal.SIGKILL)
    assert fails(domain).endswith(": its serial line was closed: the domain is shut off (crashed)")
"""
    run(pytester, text).assert_outcomes(passed=3)


def test_the_plugin_imports_little() -> None:
    code = "import sys, pytest, qemu_vmdk_snap.testing.plugin; print([m for m in "
    code += "('numpy', 'libvirt', 'pexpect', 'qemu_vmdk_snap.harness') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
