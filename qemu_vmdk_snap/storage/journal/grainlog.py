"""The log of grains that are stored and not yet named by a durable table: what a killed server leaves to the next one.

A table names a grain only after the grain is durable, so between two flushes the entries exist in memory alone. Who
promises more than durability after a flush (that what was acknowledged outlives the process) notes each entry here
before it acknowledges the write. The log is a file in memory (`/run` is a tmpfs), mapped: a note is a store of 16 bytes
without a system call. It ends with the machine: grains that were not flushed are then lost, as the guest expects.

    | header: magic, boot, device, inode, CID, generation, inode version, path | note | note | ...
    note: extent and grain (64 bits), sector (32), check over both and the generation (32)

Invariants: the log is locked while its writer lives; a flush that made the tables durable begins a new generation,
which ends the validity of all notes; the first note that fails its check ends the log. Only who holds the lock of the
file that has the name takes the name away, and a new log never replaces one that is there: so nobody removes another
log than the one that he has seen. Who only looks asks for the lock and does not take it: he is in nobody's way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from qemu_vmdk_snap import log
from qemu_vmdk_snap.light import Final, NamedTuple, Self
from qemu_vmdk_snap.storage.identity import Identity, identity_of
from qemu_vmdk_snap.storage.locks import UNLOCKED, WHOLE_FILE

_log = log.of(__name__)

_MAGIC: Final = b"QVSGRAIN"
_HEADER: Final = struct.Struct("<8s16sQQII")  # magic, boot, device, inode, CID, generation
_VERSION: Final = struct.Struct("<Q")
_VERSION_AT: Final = _HEADER.size
_PATH: Final = struct.Struct("<H")
_PATH_AT: Final = 64
_NOTES_AT: Final = 8192
"""Beyond the longest path (4096 bytes) on a page of its own."""
_NOTE: Final = struct.Struct("<QII")
_GENERATION_AT: Final = _HEADER.size - 4
_FIRST_SIZE: Final = 1 << 16
_EXTENT_SHIFT: Final = 48
_GRAIN_MASK: Final = (1 << _EXTENT_SHIFT) - 1
_FOLDER: Final = "qemu-vmdk-snap"
_LOOKING: Final = 5.0
"""Seconds until whoever looks at a log has gone."""
_FS_IOC_GETVERSION: Final = 0x80087601  # linux/fs.h: _IOR('v', 1, long)


class Noted(NamedTuple):
    """One entry that waits: the grain of which extent of the image, and the sector that stores it."""

    extent: int
    grain: int
    sector: int


def _check(key: int, sector: int, generation: int) -> int:
    return (key * 2654435761 ^ sector * 40503 ^ generation * 97 ^ 0x5EED) & 0xFFFFFFFF


def boot_id() -> bytes:
    """Return the 16 bytes that the kernel drew when the machine started."""
    text = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return bytes.fromhex(text.replace("-", ""))


def folders() -> list[Path]:
    """Return where logs are looked for, the one in which this process makes its own first."""
    found = []
    if os.geteuid() == 0:
        found.append(Path("/run", _FOLDER))
    if "RUNTIME_DIRECTORY" in os.environ:  # a systemd unit with RuntimeDirectory=
        found += [Path(one) for one in os.environ["RUNTIME_DIRECTORY"].split(":") if one]
    if os.environ.get("XDG_RUNTIME_DIR"):
        found.append(Path(os.environ["XDG_RUNTIME_DIR"], _FOLDER))
    found += [Path(f"/run/user/{os.geteuid()}", _FOLDER), Path(f"/dev/shm/{_FOLDER}-{os.geteuid()}")]
    if os.geteuid() != 0:
        found.append(Path("/run", _FOLDER))
    return list(dict.fromkeys(found))


class GrainLog:
    """An open log, locked: of this process, to note in, or of one that died, to read."""

    def __init__(self, fd: int, path: Path) -> None:
        self.path = path
        import mmap  # whoever opens an image looks for a log, and most find none

        self._fd = fd
        self._map = mmap.mmap(fd, 0)
        self._size = len(self._map)
        self._at = _NOTES_AT
        _, _, device, inode, self.cid, self._generation = _HEADER.unpack_from(self._map)
        self.identity = Identity(device, inode)
        (self.version,) = _VERSION.unpack_from(self._map, _VERSION_AT)
        (length,) = _PATH.unpack_from(self._map, _PATH_AT)
        start = _PATH_AT + _PATH.size
        self.image = Path(os.fsdecode(self._map[start : start + length]))

    @classmethod
    def create(cls, image: Path, identity: Identity, cid: int) -> Self:
        """Return a new, empty log for the image; one that a dead process left for the same inode is removed.

        Raises:
            OSError: no folder takes it, or a living process has one for this inode.
        """
        path = _own_folder() / _name(identity)
        draft = path.with_suffix(f".{os.getpid()}")
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _lock(fd)
            os.posix_fallocate(fd, 0, _FIRST_SIZE)  # a mapped hole in a full tmpfs would be a SIGBUS later
            raw = os.fsencode(image)
            head = _HEADER.pack(_MAGIC, boot_id(), identity.device, identity.inode, cid, 1)
            head += _VERSION.pack(inode_version(image))
            os.pwrite(fd, head.ljust(_PATH_AT, b"\0") + _PATH.pack(len(raw)) + raw, 0)
            _give_name(draft, path)
            return cls(fd, path)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(FileNotFoundError):
                draft.unlink()
            raise

    def note(self, extent: int, grain: int, sector: int) -> None:
        """Note that `sector` stores the grain: from now on it outlives this process."""
        at = self._at
        if at + 16 > self._size:
            self._grow()
        key = extent << _EXTENT_SHIFT | grain
        _NOTE.pack_into(self._map, at, key, sector, _check(key, sector, self._generation))
        self._at = at + 16

    def stored(self) -> None:
        """Begin a new generation: every entry noted so far is in durable tables."""
        if self._at != _NOTES_AT:
            self._generation = self._generation + 1 & 0xFFFFFFFF
            struct.pack_into("<I", self._map, _GENERATION_AT, self._generation)
            self._at = _NOTES_AT

    def __len__(self) -> int:
        """Return how many entries were noted since the last flush."""
        return (self._at - _NOTES_AT) // _NOTE.size

    def notes(self) -> Iterator[Noted]:
        """Yield the entries that wait, in the order in which they were noted."""
        for at in range(_NOTES_AT, self._size - _NOTE.size + 1, _NOTE.size):
            key, sector, check = _NOTE.unpack_from(self._map, at)
            if check != _check(key, sector, self._generation):
                return
            yield Noted(key >> _EXTENT_SHIFT, key & _GRAIN_MASK, sector)

    def remove(self) -> None:
        """Delete the log, whose lock is held, and let go of it: nothing waits in it any more."""
        _take_name(self._fd, self.path)
        self.close()

    def close(self) -> None:
        """Let go of the log; closing twice is harmless."""
        if self._fd >= 0:
            self._map.close()
            os.close(self._fd)
            self._fd = -1

    def _grow(self) -> None:
        os.posix_fallocate(self._fd, 0, 2 * self._size)
        self._map.resize(2 * self._size)
        self._size *= 2


def inode_version(image: Path) -> int:
    """Return what tells the file from an earlier one with the same inode number; 0 where the file system has no such.

    ext4, XFS and Btrfs have one. tmpfs has none, and gives no number twice.
    """
    try:
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return 0
    try:
        answer = fcntl.ioctl(fd, _FS_IOC_GETVERSION, bytes(_VERSION.size))
        return int.from_bytes(answer[:4], "little")  # file systems store 32 bits, whatever the header of Linux says
    except OSError:
        return 0
    finally:
        os.close(fd)


def waiting(image: Path) -> GrainLog | None:
    """Return the log that a dead process left for the image, with entries in it; None where there is none.

    The log of an earlier boot, an empty one, and one of a deleted file whose inode number the image has now, are
    removed. That of a living process is none. It is not locked, and so not to be removed: see `taken`.
    """
    return _found(image, taking=False)


def taken(image: Path) -> GrainLog | None:
    """Return the same, locked, for whoever has the image locked for writing and does what the log says."""
    return _found(image, taking=True)


def _found(image: Path, *, taking: bool) -> GrainLog | None:
    identity = identity_of(image)
    if identity is None:
        return None
    for folder in folders():
        opened = _open(folder / _name(identity), image, taking=taking)
        if opened is not None:
            return opened
    return None


def waiting_in(folder: Path) -> list[Path]:
    """Return the images in `folder` for which a dead process has left a log."""
    real = folder.resolve()
    found: list[Path] = []
    for home in folders():
        with contextlib.suppress(OSError):
            for entry in sorted(home.glob("grains-*.log")):
                found += _image_of(entry, real)
    return found


def _image_of(entry: Path, folder: Path) -> list[Path]:
    opened = _open(entry)
    if opened is None:
        return []
    try:
        image = opened.image
        same = image.parent == folder and identity_of(image) == opened.identity
        return [image] if same and not _is_of_another(opened, image) else []
    finally:
        opened.close()


def _is_of_another(opened: GrainLog, image: Path) -> bool:
    """Return whether the log was for an earlier file with the inode number that the image has now."""
    version = inode_version(image)
    return bool(opened.version and version) and opened.version != version


def _open(path: Path, image: Path | None = None, *, taking: bool = False) -> GrainLog | None:
    """Return the log at `path` if a process of this boot, now dead, left entries in it.

    One that is of no use to anybody is removed: an empty one, or, where `image` is known, one that was another file's.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        facts = os.fstat(fd)
        own = facts.st_uid in (0, os.geteuid()) and not facts.st_mode & 0o022
        if not own or not stat.S_ISREG(facts.st_mode) or facts.st_size < _NOTES_AT:
            _log.info("%s: ignored: it is no log that only its owner can write", path)
            os.close(fd)
            return None
        if taking:
            _lock(fd)
        elif _is_locked(fd):
            os.close(fd)
            return None
        magic, boot = _read_head(fd, path)
        if magic != _MAGIC or boot != boot_id():
            _drop(fd, path)
            os.close(fd)
            return None
        opened = GrainLog(fd, path)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.ENOENT):
            return None
        raise
    stranger = image is not None and _is_of_another(opened, image)
    if stranger or next(opened.notes(), None) is None:
        if stranger:
            _log.info("%s: removed: the image it was for, %s, does not exist any more", path, opened.image)
        _drop(fd, path)
        opened.close()
        return None
    return opened


def _lock(fd: int) -> None:
    """Take the lock of a log; raises OSError (EAGAIN) where another has it."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, WHOLE_FILE)


def _is_locked(fd: int) -> bool:
    """Return whether another has the lock of a log."""
    return fcntl.fcntl(fd, fcntl.F_OFD_GETLK, WHOLE_FILE)[:2] != UNLOCKED


def _give_name(draft: Path, path: Path) -> None:
    """Rename a new log; one of a dead process that has the name is removed, that of a living one is not."""
    deadline = time.monotonic() + _LOOKING
    while True:
        try:
            path.hardlink_to(draft)
            break
        except FileExistsError:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            try:
                removed = _drop(fd, path)
            finally:
                os.close(fd)
            if not removed:  # by somebody who is about to remove it too, or who lives
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
    draft.unlink()


def _drop(fd: int, path: Path) -> bool:
    """Remove the log open as `fd`, unless another has its lock; return whether it has the name no more."""
    try:
        _lock(fd)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    _take_name(fd, path)
    return True


def _take_name(fd: int, path: Path) -> None:
    """Remove the name of the log open and locked as `fd`, if it still has it."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(fd), path.lstat()):
            path.unlink()


def _read_head(fd: int, path: Path) -> tuple[bytes, bytes]:
    """Return magic and boot of the log."""
    head = os.pread(fd, _HEADER.size, 0)
    if len(head) < _HEADER.size:
        raise OSError(errno.EIO, "was read in part", str(path))
    magic, boot, *_ = _HEADER.unpack(head)
    return magic, boot


def _own_folder() -> Path:
    """Return the folder for the logs of this process, made where it is missing."""
    failure: OSError | None = None
    for folder in folders():
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            facts = folder.lstat()
        except OSError as error:
            failure = failure or error
            continue
        if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o022:
            return folder
    raise failure or OSError(errno.EACCES, "no folder for the log of grains", str(folders()[0]))


def _name(identity: Identity) -> str:
    return f"grains-{identity.device:x}-{identity.inode:x}.log"
