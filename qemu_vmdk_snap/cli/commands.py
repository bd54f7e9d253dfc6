"""The table of commands: with the module of each, so that only the module of the given command is imported."""

from __future__ import annotations

from qemu_vmdk_snap.light import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.cli.ui import Ui

PROGRAM: Final = "qemu-vmdk-snap"


class CommandModule(Protocol):
    """The interface of a command's module."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments to `parser`."""

    def run(self, args: argparse.Namespace, ui: Ui) -> int | None:
        """Run the command and show the result; the returned number is the exit status, None is 0."""


class Command(NamedTuple):
    """Where a command lives and the line that `--help` shows for it."""

    module: str
    help: str
    monitoring: bool = False
    """Whether it is a monitoring plugin: it has exit statuses of its own, 0 to 3, also where it fails."""


_HERE: Final = "qemu_vmdk_snap.cli"

GROUPS: Final[dict[str, str]] = {
    "image": "create, inspect, compare and convert VMDK images and chains, in qemu-img's words",
    "snapshot": "snapshot the VMDK disks of libvirt domains, in virsh's words",
    "guest": "boot a small guest on an image and check what it sees",
    "serve": "serve disks of libvirt domains by servers of our own, which gives them snapshots with memory",
    "hook": "verify, revert or snapshot a domain when libvirt starts or stops its guest",
}

COMMANDS: Final[dict[str, dict[str, Command]]] = {
    "image": {
        "create": Command(f"{_HERE}.image.create", "create an image, or an overlay backed by another image"),
        "info": Command(f"{_HERE}.image.info", "show what an image, or its whole backing chain, is"),
        "check": Command(f"{_HERE}.image.check", "check the tables of an image and its backing chain, and repair them"),
        "map": Command(f"{_HERE}.image.map", "show which file stores each part of the guest's disk"),
        "compare": Command(f"{_HERE}.image.compare", "check whether a guest reads the same bytes from two images"),
        "convert": Command(f"{_HERE}.image.convert", "copy what a guest reads into a new image"),
        "commit": Command(f"{_HERE}.image.edit.commit", "merge an overlay into an image of its backing chain"),
        "rebase": Command(f"{_HERE}.image.edit.rebase", "change the parent of an image, or make it independent"),
        "resize": Command(f"{_HERE}.image.edit.resize", "make the disk of an image larger"),
        "measure": Command(f"{_HERE}.image.measure", "calculate the size of a new image"),
        "compact": Command(f"{_HERE}.image.edit.compact", "free the space of leaked grains and of zeros"),
        "diff": Command(
            f"{_HERE}.image.diff", "list what changed between two images of a chain, or write it to a delta"
        ),
        "apply": Command(f"{_HERE}.image.edit.apply", "merge a delta into a copy of its base"),
        "remove": Command(
            f"{_HERE}.image.edit.remove", "delete an image; the images that it backs keep their contents"
        ),
    },
    "snapshot": {
        "create": Command(
            f"{_HERE}.snapshot.create", "create a snapshot: the disks of a domain continue in new overlays"
        ),
        "list": Command(f"{_HERE}.snapshot.show.list", "list the snapshots of a domain"),
        "info": Command(f"{_HERE}.snapshot.show.info", "show one snapshot and its disks"),
        "parent": Command(f"{_HERE}.snapshot.show.parent", "show the parent of a snapshot"),
        "dumpxml": Command(f"{_HERE}.snapshot.show.dumpxml", "print the XML of a snapshot"),
        "adopt": Command(
            f"{_HERE}.snapshot.edit.adopt", "register snapshots that VMware made, or that were made by hand"
        ),
        "revert": Command(f"{_HERE}.snapshot.revert", "return a domain to a snapshot"),
        "delete": Command(f"{_HERE}.snapshot.delete", "delete snapshots; all others keep their contents"),
        "prune": Command(f"{_HERE}.snapshot.prune", "delete the snapshots that a policy does not keep"),
        "current": Command(f"{_HERE}.snapshot.show.current", "show or set the current snapshot"),
        "rename": Command(f"{_HERE}.snapshot.edit.rename", "rename a snapshot"),
        "describe": Command(f"{_HERE}.snapshot.edit.describe", "change the description of a snapshot"),
        "clone": Command(
            f"{_HERE}.snapshot.whole.clone", "make a new domain of a snapshot, or of a domain that is shut off"
        ),
        "destroy": Command(
            f"{_HERE}.snapshot.whole.destroy", "undefine a domain and delete every file that is its alone"
        ),
        "move": Command(
            f"{_HERE}.snapshot.whole.move", "move the files of a domain and its snapshots to another folder"
        ),
        "consolidate": Command(
            f"{_HERE}.snapshot.whole.consolidate", "merge the links of a domain's chains that no snapshot has"
        ),
    },
    "guest": {
        "boot": Command(f"{_HERE}.guest.boot", "boot the probe guest on an image"),
        "verify": Command(
            f"{_HERE}.guest.verify", "check what a guest reads from an image or domain, or that its system boots"
        ),
        "linux": Command(f"{_HERE}.guest.linux", "make the Linux guest of the harness, of the distribution's packages"),
    },
    "serve": {
        "attach": Command(f"{_HERE}.served.attach", "let disks of a shut-off domain be served from its next start on"),
        "detach": Command(f"{_HERE}.served.detach", "let QEMU itself open the files of these disks again"),
        "start": Command(f"{_HERE}.served.start", "start the servers of a domain's disks that do not run"),
        "stop": Command(f"{_HERE}.served.stop", "stop the servers of the disks of a domain that is shut off"),
        "status": Command(f"{_HERE}.served.status", "show the served disks of a domain and their servers"),
    },
    "hook": {
        "install": Command(f"{_HERE}.hook.install", "install the libvirt hook"),
        "uninstall": Command(f"{_HERE}.hook.uninstall", "remove the libvirt hook; policies are kept"),
        "status": Command(f"{_HERE}.hook.status", "show whether the hook is installed and the policies are valid"),
        "after-stop": Command(f"{_HERE}.hook.after_stop", "create the snapshot that a policy asks for after a stop"),
    },
}

TOP_LEVEL: Final[dict[str, Command]] = {
    "serve": Command(f"{_HERE}.serve", "serve the disk of an image over NBD: snapshots and merges while it is used"),
    "recover": Command(f"{_HERE}.recover", "finish or undo an operation that was interrupted"),
    "doctor": Command(f"{_HERE}.doctor", "check this host, or a domain and its snapshots, for problems"),
    "metrics": Command(
        f"{_HERE}.monitor.metrics", "print what Prometheus collects about domains, snapshots and chains"
    ),
    "monitor": Command(
        f"{_HERE}.monitor.monitor", "check ages, counts, depths and sizes, as a plugin of Nagios", monitoring=True
    ),
    "demo": Command(f"{_HERE}.demo.demo", "prove a chain of snapshots by booting guests, in an empty folder"),
    "completion": Command(f"{_HERE}.pages.completion", "print a script that lets a shell complete commands"),
    "manual": Command(f"{_HERE}.pages.manual", "write the manual pages"),
}


def add_arguments(module: CommandModule, parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command, and those that all commands have."""
    module.configure(parser)
    parser.add_argument(
        "--output", dest="output_format", choices=("human", "json"), default="human", help="text (default) or JSON"
    )
    parser.add_argument("--debug", action="store_true", help="log what is done to standard error")
