"""The error tree: one class per decision that a caller can take; the details are attributes."""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.light import ClassVar


def printable(text: str) -> str:
    r"""Return `text` on one line: control characters, line separators and bytes that are not text are escaped.

    Names come from untrusted files, and a message must not become two lines, nor move a terminal's cursor. Bytes of
    a name that are not UTF-8 appear as `\xNN`.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # how Python carries the byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    import unicodedata  # where it is needed: few messages have such characters

    # Spaces of other widths and private characters are harmless, and may be part of somebody's name.
    if unicodedata.category(char) in ("Zs", "Co", "Cn"):
        return char
    return char.encode("unicode_escape").decode("ascii")


class VmdkSnapError(Exception):
    """Anything that this package refuses or finds broken. Failures of the system itself stay `OSError`."""

    code: ClassVar[str] = "error"
    """The code of the error for programs: lower-case words with dashes, which never change their meaning."""

    def __str__(self) -> str:
        """Return the message in one line; see `printable`."""
        return printable(self._sentence())

    def _sentence(self) -> str:
        """Return the message, with names and values unescaped."""
        return super().__str__()


class FormatError(VmdkSnapError):
    """An on-disk value breaks the format. Never raised for I/O failures."""

    code = "format"

    def __init__(self, path: Path, offset: int, field: str, value: object, rule: str) -> None:
        super().__init__(path, offset, field, value, rule)
        self.path, self.offset, self.field, self.value, self.rule = path, offset, field, value, rule

    def _sentence(self) -> str:
        return f"{self.path}: byte {self.offset:#x}: {self.field} = {self.value!r}: {self.rule}"


class Unsupported(VmdkSnapError):
    """The file is valid, or may be, but this package cannot do what was asked with it."""

    code = "unsupported"

    def __init__(self, path: Path, feature: str) -> None:
        super().__init__(path, feature)
        self.path, self.feature = path, feature

    def _sentence(self) -> str:
        return f"{self.path}: {self.feature}"


class CorruptChain(VmdkSnapError):
    """A backing chain cannot be followed: a parent is missing, not allowed, in a loop, or does not fit."""

    code = "corrupt-chain"

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def _sentence(self) -> str:
        return f"{self.path}: {self.reason}"


class MissingFile(CorruptChain):
    """A parent or an extent is not where the image says: deleted, moved, or not mounted."""

    code = "missing-file"


class CidMismatch(VmdkSnapError):
    """The parent was written after the overlay was made: the overlay no longer fits its contents."""

    code = "cid-mismatch"

    def __init__(self, overlay: Path, parent: Path, parent_cid: int, cid: int) -> None:
        super().__init__(overlay, parent, parent_cid, cid)
        self.overlay, self.parent, self.parent_cid, self.cid = overlay, parent, parent_cid, cid

    def _sentence(self) -> str:
        return (
            f"{self.overlay}: parentCID = {self.parent_cid:08x}, but the CID of its parent {self.parent} is "
            f"{self.cid:08x}: the parent was modified after the overlay was made (`image check -r all --relink-cids "
            f"{self.overlay}` makes it fit, if the change does not matter)"
        )


class LockBusy(VmdkSnapError):
    """Another process has locked the image."""

    code = "locked"

    def __init__(self, path: Path, permission: str, holder: str | None = None) -> None:
        super().__init__(path, permission, holder)
        self.path, self.permission, self.holder = path, permission, holder

    def _sentence(self) -> str:
        if self.holder is not None:
            return f"{self.path}: in use: {self.holder}"
        return f"{self.path}: failed to get the {self.permission!r} lock: is another process using the image?"


class StillNeeded(VmdkSnapError):
    """Something else needs a file that was to be removed or changed, or may need it; nothing was changed."""

    code = "still-needed"

    def __init__(self, path: Path, dependents: tuple[tuple[Path | str, str], ...]) -> None:
        super().__init__(path, dependents)
        self.path, self.dependents = path, dependents

    def __str__(self) -> str:
        (first, reason), *more = self.dependents
        others = f", and {len(more)} more" if more else ""
        return f"{self.path}: is still needed: {first} {reason}{others} (`--orphan FILE` gives a file up)"


class InvalidRequest(VmdkSnapError):
    """The request makes no sense for this image."""

    code = "invalid-request"

    def __init__(self, subject: Path | str, reason: str) -> None:
        super().__init__(subject, reason)
        self.subject, self.reason = subject, reason

    def _sentence(self) -> str:
        return f"{self.subject}: {self.reason}"


class DomainError(VmdkSnapError):
    """A libvirt domain, its XML or its connection does not allow what was asked.

    `snapshot` is the snapshot in question, if it is about one.
    """

    code = "domain"

    def __init__(self, domain: str, reason: str, *, snapshot: str | None = None) -> None:
        super().__init__(domain, reason)
        self.domain, self.reason, self.snapshot = domain, reason, snapshot

    def _sentence(self) -> str:
        return f"domain {self.domain}: {self.reason}"


class NoDomain(DomainError):
    """The connection has no domain of that name, id or UUID."""

    code = "no-domain"


class DomainExists(DomainError):
    """The connection has a domain of that name already."""

    code = "domain-exists"


class NoSnapshot(DomainError):
    """The domain has no such snapshot, or no current one."""

    code = "no-snapshot"


class SnapshotExists(DomainError):
    """The domain has a snapshot of that name."""

    code = "snapshot-exists"


class DomainBusy(DomainError):
    """Another command is changing the snapshots of the domain."""

    code = "locked"


class NotWhileRunning(DomainError):
    """What was asked for cannot be done while the guest runs; it can once it is shut off."""

    code = "not-while-running"


class GuestError(VmdkSnapError):
    """A guest failed: QEMU died, an answer was late or damaged, or a command failed in the guest."""

    code = "guest"

    def __init__(self, guest: str, reason: str) -> None:
        super().__init__(guest, reason)
        self.guest, self.reason = guest, reason
        self.logs: Path | None = None
        """The folder with the logs of the guest, where they are kept; the notes of the error have the whole report."""

    def _sentence(self) -> str:
        return f"guest {self.guest}: {self.reason}" + (f" (logs: {self.logs})" if self.logs is not None else "")


class PluginError(VmdkSnapError):
    """A drop-in, tool or library is missing or failed."""

    code = "plugin"

    def __init__(self, plugin: str, reason: str) -> None:
        super().__init__(plugin, reason)
        self.plugin, self.reason = plugin, reason

    def _sentence(self) -> str:
        return f"{self.plugin}: {self.reason}"
