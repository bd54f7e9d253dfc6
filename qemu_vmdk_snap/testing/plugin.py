"""The pytest plugin: chains of known content, guests booted on them, libvirt domains; see docs/testing-your-images.md.

Every run of pytest in the environment loads this module: it imports nothing that it does not need at once.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from qemu_vmdk_snap.errors import PluginError, VmdkSnapError

if TYPE_CHECKING:
    from qemu_vmdk_snap.harness import ChainMaker, LinuxGuest, Machine
    from qemu_vmdk_snap.testing.domains import GuestDomain

__tracebackhide__ = True

_SCALE_VARIABLE: Final = "QEMU_VMDK_SNAP_TIMEOUT_SCALE"
_QEMU: Final = "qemu-system-x86_64"
_INSTALL: Final = "is not installed (Debian: qemu-system-x86, Fedora: qemu-system-x86-core)"

MARKS: Final = {
    "vmdk_kinds": ("vmdk_kind", "run the test with `vmdk_chain` making each kind of image; 'all' stands for all"),
    "vmdk_depths": ("vmdk_depth", "run the test with `vmdk_chain.of_depth()` making chains of each depth"),
    "vmdk_controllers": ("vmdk_controller", "run the test with guests whose disks are on each controller; or 'all'"),
    "vmdk_machines": ("vmdk_machine", "run the test with guests on each machine type: pc, q35, ..."),
    "vmdk_accelerators": ("vmdk_accelerator", "run the test under each accelerator: tcg, kvm"),
}
"""Each mark, the fixture that it sets, and what it does."""

_machines = pytest.StashKey[list["Machine"]]()


# ---- options and marks -----------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the guests."""
    group = parser.getgroup("guest", "guests on VMDK images (qemu-vmdk-snap)")
    group.addoption("--guest-accel", choices=("auto", "tcg", "kvm"), default="auto", help="accelerator of the guests")
    group.addoption("--guest-keep", action="store_true", help="keep the logs of guests that did well, too")
    group.addoption(
        "--guest-require", action="store_true", help="fail tests that need what is not installed here, do not skip them"
    )
    group.addoption(
        "--guest-timeout-scale", type=_positive, metavar="FACTOR", help="give guests so many times as long (default 1)"
    )
    group.addoption(
        "--guest-log-dir", type=Path, metavar="DIR", help="keep the logs of guests in DIR, not in each test's tmp_path"
    )
    group.addoption(
        "--guest-pdb", action="store_true", help="leave a guest that fails running, its console on a socket"
    )


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(f"{text} is not a positive number")
    return value


def pytest_configure(config: pytest.Config) -> None:
    """Make the marks known, and the scale that the options ask for."""
    for mark, (_, text) in MARKS.items():
        config.addinivalue_line("markers", f"{mark}(*values): {text}")
    scale = config.getoption("--guest-timeout-scale")
    if scale is not None:
        before = os.environ.get(_SCALE_VARIABLE)
        os.environ[_SCALE_VARIABLE] = str(scale)
        config.add_cleanup(lambda: _restore(before))


def _restore(scale: str | None) -> None:
    if scale is None:
        os.environ.pop(_SCALE_VARIABLE, None)
    else:
        os.environ[_SCALE_VARIABLE] = scale


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise the tests that have one of the marks."""
    for name, (fixture, _) in MARKS.items():
        mark = metafunc.definition.get_closest_marker(name)
        if mark is None:
            continue
        where = metafunc.definition.nodeid
        if not mark.args:
            raise pytest.UsageError(f"{where}: mark {name} names no values")
        if fixture not in metafunc.fixturenames:
            raise pytest.UsageError(f"{where}: mark {name}, but the test uses neither {fixture} nor what depends on it")
        metafunc.parametrize(fixture, list(_values(name, mark.args)), indirect=True)


def _values(mark: str, args: tuple[object, ...]) -> tuple[object, ...]:
    if args != ("all",):
        return args
    if mark == "vmdk_kinds":
        from qemu_vmdk_snap.harness.chains import CREATABLE

        return CREATABLE
    if mark == "vmdk_controllers":
        from qemu_vmdk_snap.harness import CONTROLLERS

        return tuple(CONTROLLERS)
    return ("tcg", "kvm") if mark == "vmdk_accelerators" else args


# ---- what the marks set ----------------------------------------------------------------------------------------------


@pytest.fixture
def vmdk_kind(request: pytest.FixtureRequest) -> str | None:
    """Return the kind of image that `vmdk_chain` makes; None is the usual one."""
    return getattr(request, "param", None)


@pytest.fixture
def vmdk_depth(request: pytest.FixtureRequest) -> int:
    """Return the number of links that `vmdk_chain.of_depth()` makes."""
    return int(getattr(request, "param", 1))


@pytest.fixture
def vmdk_controller(request: pytest.FixtureRequest) -> str:
    """Return the controller of the guests' disks."""
    return str(getattr(request, "param", "ahci"))


@pytest.fixture
def vmdk_machine(request: pytest.FixtureRequest) -> str:
    """Return the machine type of the guests."""
    return str(getattr(request, "param", "pc"))


@pytest.fixture
def vmdk_accelerator(request: pytest.FixtureRequest) -> str | None:
    """Return the accelerator of the guests: that of the mark, else of --guest-accel; None is the faster one."""
    chosen = getattr(request, "param", None) or request.config.getoption("--guest-accel")
    if chosen == "kvm":
        from qemu_vmdk_snap.harness.accelerator import kvm_fault

        if (fault := kvm_fault()) is not None:
            lacking(request.config, f"kvm: {fault}")
    return None if chosen == "auto" else str(chosen)


# ---- chains, guests, domains -----------------------------------------------------------------------------------------


@pytest.fixture
def vmdk_chain(tmp_path: Path, vmdk_kind: str | None, vmdk_depth: int) -> ChainMaker:
    """Return the maker of chains of known content: `vmdk_chain.base("64M").write(0, b"...").snapshot()`."""
    from qemu_vmdk_snap.harness import ChainMaker

    return ChainMaker(tmp_path / "vmdk", kind=vmdk_kind, depth=vmdk_depth)


@pytest.fixture
def vmdk_guest(
    _guests: _Guests, vmdk_controller: str, vmdk_machine: str, vmdk_accelerator: str | None
) -> Callable[..., Machine]:
    """Return what boots guests, with the arguments of `harness.boot`.

    As in `guest = vmdk_guest(chain, writable=True)`. A guest ends with the test, or with its own `with` block. Its logs
    are in `tmp_path` if anything failed.
    """
    usual = {"controller": vmdk_controller, "machine": vmdk_machine, "accelerator": vmdk_accelerator}

    def start(image: Any, **options: Any) -> Machine:  # noqa: ANN401 - as `boot`
        __tracebackhide__ = True
        with _guests.lacking_skips:
            from qemu_vmdk_snap.harness import boot

            return _guests.keep(boot(image, **_guests.options(), **{**usual, **options}).__enter__())

    return start


@pytest.fixture
def vmdk_linux(
    request: pytest.FixtureRequest, _guests: _Guests, vmdk_machine: str, vmdk_accelerator: str | None
) -> Callable[..., LinuxGuest]:
    """Return what boots a Linux, with the arguments of `harness.boot_linux`.

    As in `guest = vmdk_linux(chain)`. The guest is made before the first test that wants one starts. Its disks are on
    virtio-blk, or on what the mark for controllers says.
    """
    marked = request.node.get_closest_marker("vmdk_controllers") is not None
    controller = request.getfixturevalue("vmdk_controller") if marked else "virtio-blk"
    usual = {"controller": controller, "machine": vmdk_machine, "accelerator": vmdk_accelerator}
    with _guests.lacking_skips:
        from qemu_vmdk_snap.harness import boot_linux, build_guest

        build_guest("generic" if controller == "ahci" else "cloud")

    def start(image: Any, **options: Any) -> LinuxGuest:  # noqa: ANN401 - as `boot_linux`
        __tracebackhide__ = True
        with _guests.lacking_skips:
            guest = boot_linux(image, **_guests.options(), **{**usual, **options}).__enter__()
        _guests.keep(guest.machine)
        return guest

    return start


class _Guests:
    """The guests of one test, and where their logs go."""

    def __init__(self, request: pytest.FixtureRequest, folder: Path) -> None:
        self.lacking_skips = _lacking_skips(request.config)
        self._hold = request.config.getoption("--guest-pdb")
        self._folder = folder
        self.started: list[Machine] = request.node.stash.setdefault(_machines, [])
        self._booted = 0

    def options(self) -> dict[str, Any]:
        """Return the options of the next guest that a test does not choose."""
        self._booted += 1
        return {"log_dir": self._folder / f"guest{self._booted}", "hold": self._hold}

    def keep(self, machine: Machine) -> Machine:
        """Remember a machine: it ends with the test."""
        self.started.append(machine)
        return machine


@pytest.fixture
def _guests(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[_Guests]:
    config = request.config
    guests = _Guests(request, _log_folder(request, tmp_path))
    with guests.lacking_skips:
        if shutil.which(_QEMU) is None:
            raise PluginError(_QEMU, _INSTALL)
        import qemu_vmdk_snap.harness.machine  # noqa: F401 - which needs pexpect
    yield guests
    failed = request.node.stash.get(_failed, False)
    for machine in guests.started:
        machine.kill()
        if not (failed or machine.report is not None or config.getoption("--guest-keep")):
            shutil.rmtree(machine.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def vmdk_libvirt_uri() -> Iterator[str]:
    """Return the URI for `vmdk_domain`: a libvirt in this process, no daemon. Override it for another one."""
    root = Path(tempfile.mkdtemp(prefix="vmdk-", dir="/tmp"))  # a short path, for Unix sockets
    yield f"qemu:///embed?root={root}"
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def vmdk_libvirt(pytestconfig: pytest.Config, vmdk_libvirt_uri: str) -> Iterator[Any]:
    """Return the connection to it, libvirt's own object."""
    with _lacking_skips(pytestconfig):
        if shutil.which(_QEMU) is None:
            raise PluginError(_QEMU, _INSTALL)
        from qemu_vmdk_snap.domain import connection

        opened = connection(vmdk_libvirt_uri)
        conn = opened.__enter__()
    yield conn
    opened.__exit__(None, None, None)


@pytest.fixture
def vmdk_domain(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    vmdk_libvirt: Any,  # noqa: ANN401 - a libvirt.virConnect
    vmdk_controller: str,
) -> Iterator[Callable[..., GuestDomain]]:
    """Return what defines libvirt domains, with the arguments of `GuestDomain`; they are gone after the test.

    As in `domain = vmdk_domain(chain).start()`.
    """
    from qemu_vmdk_snap.testing.domains import GuestDomain

    short = Path(tempfile.mkdtemp(prefix="vmdk-", dir="/tmp"))
    made: list[GuestDomain] = []

    def define(image: Any, **options: Any) -> GuestDomain:  # noqa: ANN401 - as `GuestDomain`
        made.append(GuestDomain(vmdk_libvirt, image, short, **{"controller": vmdk_controller, **options}))
        return made[-1]

    yield define
    for domain in made:
        domain.close()
    logs = _log_folder(request, tmp_path)
    if request.node.stash.get(_failed, False) or request.config.getoption("--guest-keep"):
        logs.mkdir(parents=True, exist_ok=True)
        for log in short.glob("*.log"):
            shutil.copy(log, logs)
    shutil.rmtree(short, ignore_errors=True)


def _log_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    chosen: Path | None = request.config.getoption("--guest-log-dir")
    if chosen is None:
        return tmp_path / "guests"
    return chosen.absolute() / re.sub(r"[^\w.\-]+", "-", request.node.nodeid).strip("-")


# ---- what is missing, and what is told -------------------------------------------------------------------------------

_failed = pytest.StashKey[bool]()


class _lacking_skips:
    """Turns a tool or library that is missing into a skip with the reason, or a failure where it is required."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, PluginError):
            lacking(self._config, str(error))


def lacking(config: pytest.Config, reason: str) -> None:
    """Skip the test for `reason`; fail it with --guest-require."""
    __tracebackhide__ = True
    if config.getoption("--guest-require"):
        pytest.fail(f"required: {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Remember that a test failed, and put the report of its guests into pytest's."""
    result: Any = yield
    if result.failed:
        item.stash[_failed] = True
        error = call.excinfo.value if call.excinfo is not None else None
        told = "\n".join(getattr(error, "__notes__", ()))
        for machine in item.stash.get(_machines, []):
            if machine.report is None and call.when == "call":
                told += _describe(machine, error, result)
            if machine.report is not None and str(machine.report) not in told:
                result.sections.append((f"guest {machine.setup.image.name}", str(machine.report)))
    return result


def _describe(machine: Machine, error: BaseException | None, result: pytest.TestReport) -> str:
    """Add to `result` the report of a guest in which the test found a fault."""
    try:
        notes = machine.failure(f"the test failed: {type(error).__name__}").__notes__
    except (VmdkSnapError, OSError, ValueError):  # a guest that is over has nothing more to say
        return ""
    result.sections += [(f"guest {machine.setup.image.name}", note) for note in notes]
    return "\n".join(notes)
