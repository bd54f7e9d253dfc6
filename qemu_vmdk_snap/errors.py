"""The error tree: one class per decision that a caller can take; the details are attributes."""

from __future__ import annotations

from pathlib import Path


class VmdkSnapError(Exception):
    """Anything that this package refuses or finds broken. Failures of the system itself stay `OSError`."""


class FormatError(VmdkSnapError):
    """An on-disk value breaks the format. Never raised for I/O failures."""

    def __init__(self, path: Path, offset: int, field: str, value: object, rule: str) -> None:
        super().__init__(path, offset, field, value, rule)
        self.path, self.offset, self.field, self.value, self.rule = path, offset, field, value, rule

    def __str__(self) -> str:
        return f"{self.path}: byte {self.offset:#x}: {self.field} = {self.value!r}: {self.rule}"


class Unsupported(VmdkSnapError):
    """The file is valid, or may be, but this package cannot do what was asked with it."""

    def __init__(self, path: Path, feature: str) -> None:
        super().__init__(path, feature)
        self.path, self.feature = path, feature

    def __str__(self) -> str:
        return f"{self.path}: {self.feature}"


class CorruptChain(VmdkSnapError):
    """A backing chain cannot be followed: a parent is missing, not allowed, in a loop, or does not fit."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class MissingFile(CorruptChain):
    """A parent or an extent is not where the image says: it may be gone, moved, or not mounted."""


class CidMismatch(VmdkSnapError):
    """The parent was written after the overlay was made: what the overlay leaves out is no longer there."""

    def __init__(self, overlay: Path, parent: Path, parent_cid: int, cid: int) -> None:
        super().__init__(overlay, parent, parent_cid, cid)
        self.overlay, self.parent, self.parent_cid, self.cid = overlay, parent, parent_cid, cid

    def __str__(self) -> str:
        return (
            f"{self.overlay}: parentCID = {self.parent_cid:08x}, but the CID of its parent {self.parent} is "
            f"{self.cid:08x}: the parent was modified after the overlay was made (`image check -r all --relink-cids "
            f"{self.overlay}` makes it fit, if the change does not matter)"
        )


class LockBusy(VmdkSnapError):
    """Another process holds the image in a way that excludes what was asked."""

    def __init__(self, path: Path, permission: str) -> None:
        super().__init__(path, permission)
        self.path, self.permission = path, permission

    def __str__(self) -> str:
        return f"{self.path}: failed to get the {self.permission!r} lock: is another process using the image?"


class StillNeeded(VmdkSnapError):
    """Something else needs a file that was to be removed or changed, or may need it; nothing was changed."""

    def __init__(self, path: Path, dependents: tuple[tuple[Path | str, str], ...]) -> None:
        super().__init__(path, dependents)
        self.path, self.dependents = path, dependents

    def __str__(self) -> str:
        (first, reason), *more = self.dependents
        others = f", and {len(more)} more" if more else ""
        return f"{self.path}: is still needed: {first} {reason}{others} (`--orphan FILE` gives a file up)"


class InvalidRequest(VmdkSnapError):
    """What the caller asked for makes no sense for this image, whatever is on the disk."""

    def __init__(self, subject: Path | str, reason: str) -> None:
        super().__init__(subject, reason)
        self.subject, self.reason = subject, reason

    def __str__(self) -> str:
        return f"{self.subject}: {self.reason}"


class DomainError(VmdkSnapError):
    """A libvirt domain, its XML or its connection does not allow what was asked."""

    def __init__(self, domain: str, reason: str) -> None:
        super().__init__(domain, reason)
        self.domain, self.reason = domain, reason

    def __str__(self) -> str:
        return f"domain {self.domain}: {self.reason}"


class GuestError(VmdkSnapError):
    """A guest did not do its part: QEMU died, an answer was late or damaged, or a command failed inside."""

    def __init__(self, guest: str, reason: str) -> None:
        super().__init__(guest, reason)
        self.guest, self.reason = guest, reason

    def __str__(self) -> str:
        return f"guest {self.guest}: {self.reason}"


class PluginError(VmdkSnapError):
    """Something from outside that we called (a drop-in, a needed tool or library) is missing or failed."""

    def __init__(self, plugin: str, reason: str) -> None:
        super().__init__(plugin, reason)
        self.plugin, self.reason = plugin, reason

    def __str__(self) -> str:
        return f"{self.plugin}: {self.reason}"
