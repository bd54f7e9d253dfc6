"""The table of commands: where each one's module is, so that only the one called for is imported."""

from __future__ import annotations

from typing import Final, NamedTuple


class Command(NamedTuple):
    """Where a command lives and the line that `--help` shows for it."""

    module: str
    help: str


_HERE: Final = "qemu_vmdk_snap.cli"

GROUPS: Final[dict[str, str]] = {
    "image": "create, inspect, compare and convert VMDK images and chains, in qemu-img's words",
    "snapshot": "snapshot the VMDK disks of libvirt domains, in virsh's words",
    "guest": "boot a small guest on an image and check what it sees",
    "hook": "let libvirt verify, revert or snapshot a domain when its guest starts or has stopped",
}

COMMANDS: Final[dict[str, dict[str, Command]]] = {
    "image": {
        "create": Command(f"{_HERE}.image.create", "make an image, or an overlay on another image"),
        "info": Command(f"{_HERE}.image.info", "tell what an image, or its whole backing chain, is"),
        "check": Command(f"{_HERE}.image.check", "check the tables of an image and the chain below it"),
        "map": Command(f"{_HERE}.image.map", "tell where each part of the guest's disk is stored"),
        "compare": Command(f"{_HERE}.image.compare", "tell whether a guest would see the same bytes on two images"),
        "convert": Command(f"{_HERE}.image.convert", "copy what a guest sees into a new image"),
        "commit": Command(f"{_HERE}.image.commit", "merge an image into one below it"),
        "rebase": Command(f"{_HERE}.image.rebase", "put an image on another parent, or on none"),
        "resize": Command(f"{_HERE}.image.resize", "make the disk of an image larger"),
        "measure": Command(f"{_HERE}.image.measure", "tell how much space a new image would take"),
        "compact": Command(f"{_HERE}.image.compact", "give back the space of leaked grains and of zeros"),
        "diff": Command(f"{_HERE}.image.diff", "tell what changed between two links, or write it down as a delta"),
        "apply": Command(f"{_HERE}.image.apply", "merge a delta into a copy of its base"),
        "remove": Command(f"{_HERE}.image.remove", "delete an image of a tree; the others keep what they read"),
    },
    "snapshot": {
        "create": Command(f"{_HERE}.snapshot.create", "freeze the disks of a domain and go on in new overlays"),
        "list": Command(f"{_HERE}.snapshot.list", "list the snapshots of a domain"),
        "info": Command(f"{_HERE}.snapshot.info", "tell about one snapshot"),
        "adopt": Command(f"{_HERE}.snapshot.adopt", "register snapshots that VMware made, or that were made by hand"),
        "revert": Command(f"{_HERE}.snapshot.revert", "let a domain be what it was when a snapshot was taken"),
        "delete": Command(f"{_HERE}.snapshot.delete", "delete snapshots; all others keep what they hold"),
        "prune": Command(f"{_HERE}.snapshot.prune", "delete the snapshots that a policy does not keep"),
        "current": Command(f"{_HERE}.snapshot.current", "tell the current snapshot, or make another one current"),
        "rename": Command(f"{_HERE}.snapshot.rename", "give a snapshot another name"),
        "describe": Command(f"{_HERE}.snapshot.describe", "give a snapshot another description"),
    },
    "guest": {
        "boot": Command(f"{_HERE}.guest.boot", "boot the probe guest on an image"),
        "verify": Command(f"{_HERE}.guest.verify", "check that a guest reads what the engine reads"),
    },
    "hook": {
        "install": Command(f"{_HERE}.hook.install", "put the hook where libvirt runs it"),
        "uninstall": Command(f"{_HERE}.hook.uninstall", "take the hook away; policies stay"),
        "status": Command(f"{_HERE}.hook.status", "tell whether the hook and the policies are in order"),
        "after-stop": Command(f"{_HERE}.hook.after_stop", "take the snapshot that a policy wants after a stop"),
    },
}

TOP_LEVEL: Final[dict[str, Command]] = {
    "recover": Command(f"{_HERE}.recover", "finish what a killed command has left half done"),
    "doctor": Command(f"{_HERE}.doctor", "tell what is wrong with this host, or with a domain's snapshots"),
    "demo": Command(f"{_HERE}.demo", "show a guest prove a chain of snapshots, from an empty folder"),
    "completion": Command(f"{_HERE}.completion", "print a script that lets a shell complete commands"),
    "manual": Command(f"{_HERE}.manual", "write the manual pages"),
}
