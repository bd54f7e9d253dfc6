"""The report of a guest that failed: its consoles, QEMU's output, the monitor, the chain, and how to run it again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from qemu_vmdk_snap import chain_info
from qemu_vmdk_snap.errors import GuestError, VmdkSnapError, printable
from qemu_vmdk_snap.harness.watch.qmp import Qmp
from qemu_vmdk_snap.units import format_size

_LINES: Final = 12
_MONITOR_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class FailureReport:
    """One failed guest; every part is text of some lines, `""` where there is nothing."""

    reason: str
    serial: str
    """The last lines of the serial line."""
    firmware: str
    """The last lines of the firmware's debug console."""
    stderr: str
    """What QEMU wrote to standard error."""
    qmp: str
    """The last messages to and from the monitor."""
    host_chain: str
    """The chain as the engine reads it: a line for each link."""
    qemu_chain: str
    """The chain as QEMU has it open, and the disks as the firmware found them."""
    command: str
    """The command that boots the same again, by hand; the image is only read."""
    logs: Path

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types."""
        return {field.name.replace("_", "-"): str(getattr(self, field.name)) for field in fields(self)}

    def __str__(self) -> str:
        """Return the whole report."""
        titles = {
            "serial": f"serial line, last {_LINES} lines",
            "firmware": f"firmware, last {_LINES} lines",
            "stderr": "standard error of QEMU",
            "qmp": f"QMP, last {_LINES} messages",
            "host_chain": "the chain as the host reads it",
            "qemu_chain": "the chain as QEMU has it open, and the disks as the firmware sees them",
            "command": "run it again (the image is not written)",
        }
        parts = [f"guest report: {self.reason}"]
        for field in fields(self):
            if field.name in titles:
                text = getattr(self, field.name) or "(nothing)"
                parts += [f"--- {titles[field.name]}", text]
        return "\n".join([*parts, f"--- logs: {self.logs}"])


def gather(reason: str, images: Sequence[Path], folder: Path, qmp: Qmp | str, command: str) -> FailureReport:
    """Return the report of a guest whose logs are in `folder`; `qmp` is asked, or is why not."""
    return FailureReport(
        reason=reason,
        serial=tail(folder / "serial.log"),
        firmware=tail(folder / "firmware.log"),
        stderr=tail(folder / "stderr.log"),
        host_chain="\n".join(line for image in images for line in _host_chain(image)),
        qemu_chain="\n".join([*_qemu_chain(qmp), *_firmware_disks(folder / "firmware.log")]),
        qmp=tail(folder / "qmp.log", width=240),
        command=command,
        logs=folder,
    )


def tail(path: Path, lines: int = _LINES, width: int = 400) -> str:
    """Return the last lines of a log, each cut at `width`, without control characters; `""` where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - (1 << 16)))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    kept = [line.rstrip() for line in text.replace("\r", "").split("\n") if line.strip()][-lines:]
    return "\n".join(printable(line if len(line) <= width else f"{line[:width]}...") for line in kept)


def _host_chain(image: Path) -> Iterator[str]:
    try:
        links = chain_info(image, lock=False, trusted_dirs=[image.absolute().parent])
    except (VmdkSnapError, OSError) as error:
        yield f"{image}: {error}"
        return
    for depth, link in enumerate(links):
        parent = "no parent" if link.hint is None else f"parentCID {link.parent_cid:08x} ({link.hint})"
        size = format_size(link.virtual_size)
        yield f"{depth}  {link.path}  {link.create_type}, {size}, CID {link.cid:08x}, {parent}"
        yield from (f"   ! {note}" for note in link.notes)


def _qemu_chain(qmp: Qmp | str) -> Iterator[str]:
    if isinstance(qmp, str) or qmp.closed:
        yield qmp if isinstance(qmp, str) else "QEMU has ended"
        return
    try:
        blocks = qmp("query-block", seconds=_MONITOR_SECONDS)
    except GuestError as error:
        yield error.reason
        return
    for block in blocks:
        image: dict[str, Any] | None = block.get("inserted", {}).get("image")
        depth = 0
        while image is not None:
            size = format_size(image["virtual-size"])
            yield f"{block.get('device') or block.get('qdev')} {depth}  {image['filename']}  {image['format']}, {size}"
            image, depth = image.get("backing-image"), depth + 1


def _firmware_disks(log: Path) -> Iterator[str]:
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        if "registering:" in line or "Hard-Disk" in line or line.startswith("drive 0x"):
            yield printable(f"firmware: {line.strip()}")
