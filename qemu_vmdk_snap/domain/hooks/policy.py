"""A domain's policy file: what the hook does when its guest starts and after it has stopped.

One file per domain in `/etc/qemu-vmdk-snap/domains`: `UUID.toml`, which follows the domain when it is renamed, or else
`NAME.toml`:

    verify = "chain"             # or "deep"; a broken chain is not started
    revert-on-start = true       # or ["vda"]: these disks begin each run as their last snapshot left them
    trusted-dirs = ["/srv/base"] # where parents may lie besides the folders that the domain's XML names
    deadline = 30                # seconds the hook may take at a start
    serve = false                # somebody else starts the servers of its served disks
    snapshot-after-stop = true
    keep-last = 7                # which of the snapshots taken after a stop stay; also keep-hourly, -daily, ...
    connect = "qemu:///system"   # where the snapshot after a stop finds the domain

An unknown word is an error: a policy must not silently do less than it says.
"""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.errors import InvalidRequest
from qemu_vmdk_snap.light import Any, Final, NamedTuple

FOLDER: Final = Path("/etc/qemu-vmdk-snap/domains")
VERIFY: Final = ("no", "chain", "deep")
KEEP: Final = ("keep-last", "keep-hourly", "keep-daily", "keep-weekly", "keep-monthly")
DEFAULT_DEADLINE: Final = 30.0
DEEP_DEADLINE: Final = 600.0
DEFAULT_CONNECT: Final = "qemu:///system"


class Policy(NamedTuple):
    """The policy of one domain."""

    path: Path
    verify: str = "no"
    revert: tuple[str, ...] | bool = False
    """Targets of the disks that are renewed at each start; True: every disk that can take part in a snapshot."""
    trusted: tuple[str, ...] = ()
    """Folders that parents may lie in, besides those that the domain's XML names."""
    deadline: float = DEFAULT_DEADLINE
    """Seconds."""
    snapshot_after_stop: bool = False
    keep: tuple[tuple[str, int], ...] = ()
    """(`keep-last`, 7) and so on, in the order of `KEEP`; empty: all are kept."""
    connect: str = DEFAULT_CONNECT
    serve: bool = True
    """Whether the hook starts and stops the servers of served disks."""


def load(path: Path) -> Policy:
    """Return the policy in the file.

    Raises:
        InvalidRequest: it is invalid, or contradicts itself.
        OSError: it cannot be read.
    """
    import tomllib

    try:
        words: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad TOML and bad UTF-8 alike
        raise InvalidRequest(path, f"is not TOML: {error}") from error
    keep = tuple((word, _count(path, word, words.pop(word))) for word in KEEP if word in words)
    verify = _choice(path, "verify", words.pop("verify", "no"), VERIFY)
    deadline = words.pop("deadline", DEEP_DEADLINE if verify == "deep" else DEFAULT_DEADLINE)
    policy = Policy(
        path=path,
        verify=verify,
        revert=_revert(path, words.pop("revert-on-start", False)),
        trusted=_folders(path, words.pop("trusted-dirs", [])),
        deadline=_seconds(path, deadline),
        snapshot_after_stop=_truth(path, "snapshot-after-stop", words.pop("snapshot-after-stop", False)),
        keep=keep,
        connect=_text(path, "connect", words.pop("connect", DEFAULT_CONNECT)),
        serve=_truth(path, "serve", words.pop("serve", True)),
    )
    if words:
        raise InvalidRequest(path, f"{next(iter(words))!r} is not known")
    if policy.snapshot_after_stop and policy.revert:
        reason = "revert-on-start and snapshot-after-stop exclude each other: each start would revert to the last stop"
        raise InvalidRequest(path, reason)
    if policy.keep and not policy.snapshot_after_stop:
        raise InvalidRequest(path, f"{policy.keep[0][0]} needs snapshot-after-stop")
    return policy


def _choice(path: Path, word: str, value: object, choices: tuple[str, ...]) -> str:
    if value is False:
        value = "no"
    if not isinstance(value, str) or value not in choices:
        raise InvalidRequest(path, f"{word} = {value!r} must be one of {', '.join(choices)}")
    return value


def _revert(path: Path, value: object) -> tuple[str, ...] | bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, list) and value and all(isinstance(target, str) for target in value):
        return tuple(value)
    raise InvalidRequest(path, f"revert-on-start = {value!r} must be true, false or a list of disks")


def _folders(path: Path, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(folder, str) and folder.startswith("/") for folder in value):
        raise InvalidRequest(path, f"trusted-dirs = {value!r} must be a list of absolute paths")
    return tuple(value)


def _truth(path: Path, word: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(path, f"{word} = {value!r} must be true or false")
    return value


def _count(path: Path, word: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidRequest(path, f"{word} = {value!r} must be a number from 1 on")
    return value


def _seconds(path: Path, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 86400:
        raise InvalidRequest(path, f"deadline = {value!r} must be seconds, at most a day")
    return float(value)


def _text(path: Path, word: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequest(path, f"{word} = {value!r} must be a text")
    return value
