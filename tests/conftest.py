"""What holds for every test: order, Hypothesis profiles, needed tools, scratch folders, no process left behind."""

from __future__ import annotations

import functools
import importlib.util
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import hypothesis
import pytest

if TYPE_CHECKING:
    import libvirt

    from tests.domain.libvirtd import Daemon

ORDER: Final = ("unit", "golden", "property", "oracle", "fuzz", "crash", "e2e")
"""Folders of tests/ in the order they run: the quick answers first. One that is not named runs before e2e."""

QUICK: Final = (
    "unit/",
    "golden/",
    "property/test_chain_history.py",
    "oracle/test_qemu_agrees.py",
    "fuzz/test_mutated_texts.py",
    "crash/test_write_order.py",
    "crash/test_power_cuts.py::test_a_cut_within_an_operation[commit_delete-sparse]",
    "domain/xml/",
    "domain/test_naming.py",
    "harness/",
    "testing/test_from_a_wheel.py",
    "serve/test_served.py::test_what_was_acknowledged_is_there_after_a_kill",
    "e2e/test_guest.py",
)
"""What `--quick` runs: beginnings of the names of tests, one or two that stand for each folder."""

MODULES: Final = {"libvirt": "libvirt", "libnbd": "nbd", "libvmdk-python": "pyvmdk", "dissect.hypervisor": "dissect"}
"""Tools that are no executables but bindings, and the module that each is."""

DISTRIBUTIONS: Final = tuple(Path(prefix, "bin/ansible-playbook") for prefix in (f"{sys.prefix}/oracles/usr", "/usr"))
"""Where the distribution's own Ansible may be: unpacked by bootstrap beside the virtual environment's, or installed."""

SESSION_VARIABLE: Final = "QEMU_VMDK_SNAP_TEST_SESSION"
PATIENCE_VARIABLE: Final = "QEMU_VMDK_SNAP_TEST_PATIENCE"
"""Seconds in which the processes that the tests have started, and that are about to end, must have ended."""
SERVERS: Final = ("qemu", "virt", "libvirt", "swtpm")
"""Beginnings of the names of processes that may lose our environment (libvirt clears it) and outlive a test."""

# A deadline would measure the machine, which TCG guests share. `ci` draws the same examples each time.
_ANY_SPEED: Final = hypothesis.settings(
    deadline=None, print_blob=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("dev", _ANY_SPEED)
hypothesis.settings.register_profile("ci", _ANY_SPEED, derandomize=True)
hypothesis.settings.register_profile("thorough", _ANY_SPEED, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

# Where these are set pytest explains in full how two values differ, which takes minutes for a few pages of bytes.
for _name in ("CI", "BUILD_NUMBER"):
    os.environ.pop(_name, None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        default="none",
        metavar="TOOL,...",
        help="tools whose absence fails the tests that need them instead of skipping these; `all`, or `none` (default)",
    )
    parser.addoption(
        "--quick", action="store_true", help="run the quick selection: unit, golden, and some of each other folder"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=_rank)
    if config.getoption("--quick"):
        left_out = [item for item in items if not item.nodeid.removeprefix("tests/").startswith(QUICK)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid.removeprefix("tests/").startswith(QUICK)]


def _rank(item: pytest.Item) -> float:
    here = Path(__file__).parent
    folder = item.path.relative_to(here).parts[0] if item.path.is_relative_to(here) else ""
    return ORDER.index(folder) if folder in ORDER else len(ORDER) - 1.5


def pytest_runtest_setup(item: pytest.Item) -> None:
    required = str(item.config.getoption("--require")).split(",")
    for mark in item.iter_markers("needs"):
        for tool in mark.args:
            if (reason := lacking(tool)) is None:
                continue
            if tool in required or "all" in required:
                pytest.fail(f"required: {reason}", pytrace=False)
            pytest.skip(reason)


@functools.cache
def lacking(tool: str) -> str | None:
    """Return why `tool` cannot be used here, or None."""
    if tool in MODULES:
        found = importlib.util.find_spec(MODULES[tool]) is not None
        return None if found else f"{tool}: no Python module {MODULES[tool]!r}"
    if tool == "distribution-ansible":
        return None if any(path.exists() for path in DISTRIBUTIONS) else f"{tool}: neither of {DISTRIBUTIONS}"
    return None if shutil.which(tool) else f"{tool} is not installed"


@pytest.fixture(scope="session")
def samples() -> Path:
    """Return the folder of VMDK files that other programs wrote, which not every machine has."""
    folder = os.environ.get("VMDK_SAMPLES")
    if not folder:
        pytest.skip("VMDK_SAMPLES names no folder with samples")
    assert Path(folder).is_dir(), f"VMDK_SAMPLES: no folder {folder}"
    return Path(folder)


@pytest.fixture(scope="session")
def scratch_root() -> Iterator[Path]:
    """Return a folder with a short path, for Unix sockets (108 bytes), that QEMU's own user may pass through."""
    folder = Path(tempfile.mkdtemp(prefix="vmdk-", dir="/tmp"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def scratch(scratch_root: Path) -> Iterator[Path]:
    """Return a fresh folder of one test under `scratch_root`; it is gone afterwards."""
    folder = Path(tempfile.mkdtemp(dir=scratch_root))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def embed_uri(scratch_root: Path) -> str:
    """Return the URI of the one in-process libvirt that all tests share: a process can have one only."""
    return f"qemu:///embed?root={scratch_root / 'e'}"


@pytest.fixture(scope="session")
def embed(embed_uri: str) -> libvirt.virConnect:
    """Return the connection to it."""
    from qemu_vmdk_snap.domain.connect import open_connection

    return open_connection(embed_uri)


@pytest.fixture(scope="session")
def the_daemon(scratch_root: Path) -> Iterator[Daemon]:
    # Here and nowhere else: a fixture that another conftest.py imports is a second one, with a second daemon.
    from tests.domain.libvirtd import private_daemon

    with private_daemon(scratch_root / "v") as daemon:
        yield daemon


@pytest.fixture
def daemon(the_daemon: Daemon) -> Daemon:
    """Return the private daemon that all tests share, running."""
    return the_daemon.ensure()


@pytest.fixture(scope="session", autouse=True)
def no_process_left_behind(scratch_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kill the processes that the tests left running, and fail for each of them."""
    token = secrets.token_hex(8)
    os.environ[SESSION_VARIABLE] = token
    yield
    folders = (scratch_root, tmp_path_factory.getbasetemp())
    deadline = time.monotonic() + float(os.environ.get(PATIENCE_VARIABLE, "30"))
    time.sleep(0.05)  # one that is just being executed has no environment to be known by
    while (left := strays(token, folders)) and time.monotonic() < deadline:
        time.sleep(0.05)  # one that is just exiting is none
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"processes left running, now killed: {left}"


def strays(token: str, folders: tuple[Path, ...]) -> dict[int, str]:
    """Return pid and command line of each process that has `token` in its environment, or is a server in `folders`."""
    found: dict[int, str] = {}
    variable = f"{SESSION_VARIABLE}={token}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            name = (process / "comm").read_text().strip()
        except OSError:  # ended meanwhile, or another user's
            continue
        ours = variable in environment or (name.startswith(SERVERS) and any(f"{f}/" in words for f in folders))
        if ours and int(process.name) != os.getpid():
            found[int(process.name)] = words
    return found
