"""Connections to libvirt, the in-process driver included, and libvirt's errors as ours."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from urllib.parse import parse_qs, urlsplit

from qemu_vmdk_snap.errors import DomainError, InvalidRequest, NoDomain, PluginError
from qemu_vmdk_snap.light import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import libvirt

INSTALL_HINT: Final = "install python3-libvirt (Debian, Ubuntu), python3-libvirt (Fedora) or libvirt-python (PyPI)"

_MAX_ROOT: Final = 60
"""Bytes: below its root the driver puts Unix sockets (lib/qemu/domain-1-NAME/monitor.sock), which end at 107 bytes."""

_EMBED_CONF: Final = """\
# Written by qemu-vmdk-snap for a libvirt that runs inside one process: there is no virtlogd to hand the guest's
# output to, and whoever opened the connection runs the guests and owns the images.
stdio_handler = "file"
security_driver = "none"
user = "+{uid}"
group = "+{gid}"
dynamic_ownership = 0
remember_owner = 0
namespaces = []
cgroup_controllers = []
"""

_embedded: dict[Path, libvirt.virConnect] = {}
_loop_started = False
_loop_lock = threading.Lock()


@contextlib.contextmanager
def connection(uri: str | None = None) -> Iterator[libvirt.virConnect]:
    """Open `uri` (None: LIBVIRT_DEFAULT_URI, else libvirt's own choice) for the length of the block.

    Raises:
        PluginError: the binding is missing, or libvirt cannot connect.
        InvalidRequest: the URI is remote, or its embed root is unusable.
    """
    conn = open_connection(uri)
    try:
        yield conn
    finally:
        if conn not in _embedded.values():
            conn.close()


def open_connection(uri: str | None = None) -> libvirt.virConnect:
    """Return an open connection; see `connection`.

    `qemu:///embed?root=DIR` gets the event loop that it needs, is opened once per process, and stays open: each
    open adds its drivers to libvirt's table permanently, and the table is full after about ten.
    """
    wanted = uri or os.environ.get("LIBVIRT_DEFAULT_URI", "")
    _refuse_remote(wanted)
    root = embed_root(wanted)
    if root in _embedded:
        return _embedded[root]
    if root is not None and _embedded:
        raise InvalidRequest(wanted, f"this process has its libvirt in {next(iter(_embedded))}, and can have only one")
    if root is not None:
        prepare_embed_root(root)
    libvirt = import_libvirt(log=root / "libvirt.log" if root else None)
    if root is not None:
        _start_event_loop(libvirt)
    try:
        conn = libvirt.open(uri)
    except libvirt.libvirtError as error:
        raise PluginError(f"libvirt {uri or 'default connection'}", _message(error)) from error
    if root is not None:
        if not _embedded:
            atexit.register(_embedded.clear)  # while the binding can still close it: later it would print an error
        _embedded[root] = conn
    try:
        _refuse_remote(conn.getURI())
    except InvalidRequest:
        conn.close()
        raise
    return conn


def import_libvirt(log: Path | None = None) -> ModuleType:
    """Return the binding, silent on standard error: its errors are exceptions, its log goes to `log` if given.

    Raises:
        PluginError: it is not installed.
    """
    # The library reads its log settings once, when the binding is imported; what the user has set stays.
    quiet = log is not None and not any(name.startswith("LIBVIRT_LOG_") for name in os.environ)
    if quiet:
        os.environ["LIBVIRT_LOG_OUTPUTS"] = f"3:file:{log}"
    try:
        import libvirt
    except ImportError as error:
        raise PluginError("libvirt", f"its Python binding is missing: {INSTALL_HINT}") from error
    finally:
        if quiet:
            del os.environ["LIBVIRT_LOG_OUTPUTS"]
    libvirt.registerErrorHandler(_ignore, None)
    module: ModuleType = libvirt
    return module


def embed_root(uri: str) -> Path | None:
    """Return the root folder of a `qemu:///embed?root=DIR` URI, or None for any other URI."""
    parts = urlsplit(uri)
    if parts.scheme != "qemu" or parts.path != "/embed":
        return None
    roots = parse_qs(parts.query).get("root")
    if not roots or not roots[0].startswith("/"):
        raise InvalidRequest(uri, "must name its folder by an absolute path: qemu:///embed?root=/DIR")
    return Path(roots[0])


def prepare_embed_root(root: Path) -> None:
    """Make the folder of an in-process libvirt, with a configuration that needs no daemon beside it.

    A configuration that is there already is left as it is.
    """
    _check_root(root)
    _lend_home(root)
    conf = root / "etc" / "qemu.conf"
    conf.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError), conf.open("x") as file:
        file.write(_EMBED_CONF.format(uid=os.geteuid(), gid=os.getegid()))


def _lend_home(root: Path) -> None:
    """Let libvirt have its cache in `root` where this user has no home, or none that can be written.

    Not all of its state is below the root: a user's driver for devices keeps its own in `~/.cache/libvirt`.
    """
    with contextlib.suppress(OSError, RuntimeError):  # the latter: there is no such user
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "libvirt"
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK | os.X_OK):
            return
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    os.environ.setdefault("HOME", str(root))


def find_domain(conn: libvirt.virConnect, name: str) -> libvirt.virDomain:
    """Return the domain of that name, UUID or id, tried in virsh's order: id, UUID, name.

    Raises:
        DomainError: there is none.
    """
    import libvirt

    lookups: list[Any] = [conn.lookupByUUIDString, conn.lookupByName]
    if name.isdigit():
        lookups.insert(0, lambda text: conn.lookupByID(int(text)))
    for lookup in lookups:
        try:
            return lookup(name)
        except libvirt.libvirtError as error:
            if error.get_error_code() not in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_INVALID_ARG):
                raise DomainError(name, _message(error)) from error
    raise NoDomain(name, "there is no domain of that name")


@contextlib.contextmanager
def libvirt_errors(domain: str, doing: str) -> Iterator[None]:
    """Turn a libvirtError inside the block into a DomainError about `domain`: "cannot `doing`"."""
    import libvirt

    try:
        yield
    except libvirt.libvirtError as error:
        raise DomainError(domain, f"cannot {doing}: {_message(error)}") from error


def _message(error: Exception) -> str:
    return " ".join(str(error).split())


def _ignore(context: object, error: object) -> None:
    """Replace libvirt's handler, which prints."""


def _check_root(root: Path) -> None:
    """Refuse a root whose socket paths are too long for the kernel."""
    if len(os.fsencode(root)) > _MAX_ROOT:
        reason = f"must be at most {_MAX_ROOT} bytes long: the sockets below it end at 107"
        raise InvalidRequest(root, reason)


def _refuse_remote(uri: str) -> None:
    """The engine works on local files, so libvirt must be here too."""
    parts = urlsplit(uri)
    transport = parts.scheme.partition("+")[2]
    if parts.hostname or transport not in ("", "unix"):
        raise InvalidRequest(
            uri, "is remote, and the disks must be files of this machine: run the command on that host"
        )


def _start_event_loop(libvirt: ModuleType) -> None:
    """Run libvirt's event loop in the background, once per process: the in-process driver needs it."""
    global _loop_started
    with _loop_lock:
        if _loop_started:
            return
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run_events, args=(libvirt,), name="libvirt-events", daemon=True).start()
        _loop_started = True


def _run_events(libvirt: ModuleType) -> None:
    while True:
        libvirt.virEventRunDefaultImpl()
