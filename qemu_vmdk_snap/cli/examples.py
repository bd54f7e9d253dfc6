"""Examples of every command, which end its help and its manual page: the words behind the program's name, and why."""

from __future__ import annotations

from typing import Final

EXAMPLES: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "image create": (
        ("image create base.vmdk 20G", "a disk of 20 GiB that grows with what is written"),
        ("image create -b base.vmdk top.vmdk", "an overlay: what is written goes there, and the base stays"),
        ("image create -o subformat=streamOptimized,? x.vmdk", "what -o takes for this kind"),
    ),
    "image info": (("image info --backing-chain top.vmdk", "every link from the top to the base"),),
    "image check": (
        ("image check --backing-chain top.vmdk", "read only: 0 good, 2 corrupt, 3 leaks"),
        ("image check -r all --undo-file top.undo top.vmdk", "repair, and keep what is overwritten"),
        ("image check --take-back top.undo top.vmdk", "undo that repair"),
    ),
    "image map": (("image map --output=json top.vmdk", "which file stores each range, for a program"),),
    "image compare": (("image compare top.vmdk copy.vmdk", "exit status 0: the same, 1: different"),),
    "image convert": (
        ("image convert top.vmdk whole.vmdk", "one file of a whole chain"),
        ("image convert -O raw top.vmdk disk.raw", "for a tool that reads no VMDK"),
        ("image convert -o subformat=streamOptimized top.vmdk appliance.vmdk", "compressed, as in an OVA"),
    ),
    "image commit": (("image commit -d top.vmdk", "merge the overlay into its parent, and delete it"),),
    "image rebase": (
        ("image rebase -b other.vmdk top.vmdk", "another parent; the image reads what it read"),
        ("image rebase -u -b moved/base.vmdk top.vmdk", "only the name of a parent that was moved"),
        ("image rebase -b '' top.vmdk", "no parent: everything is copied into the image"),
    ),
    "image resize": (("image resize disk.vmdk +10G", "10 GiB more, at the end of the disk"),),
    "image measure": (("image measure top.vmdk", "how large a copy would be"),),
    "image compact": (("image compact disk.vmdk", "give back what the guest has filled with zeros"),),
    "image diff": (
        ("image diff base.vmdk top.vmdk", "which ranges changed"),
        ("image diff -d monday.vmdk base.vmdk top.vmdk", "the changes alone, as an incremental backup"),
    ),
    "image apply": (("image apply monday.vmdk copy-of-base.vmdk", "bring a copy of the base up to date"),),
    "image remove": (("image remove middle.vmdk", "its children get what it held, and its parent"),),
    "snapshot create": (
        ("snapshot create web before-upgrade", "all VMDK disks of the domain, running or not"),
        ("snapshot create web --quiesce --description 'before the upgrade'", "with the file systems frozen"),
        ("snapshot create web s1 --diskspec vdb,snapshot=no --dry-run", "without one disk, and only the plan"),
        ("snapshot create web s1 --naming uuid", "overlays called UUID.vmdk, not disk-000001.vmdk"),
    ),
    "snapshot list": (
        ("snapshot list web --tree", "who is whose child, as virsh draws it"),
        ("snapshot list web --from before-upgrade --descendants", "what was made on top of one"),
        ("snapshot list --all --output=json", "all domains, for a program"),
    ),
    "snapshot info": (("snapshot info web --current", "its files, their sizes, and whether they are sound"),),
    "snapshot parent": (("snapshot parent web --current", "the snapshot before the current one"),),
    "snapshot dumpxml": (("snapshot dumpxml web before-upgrade", "with the domain as it was inside"),),
    "snapshot adopt": (("snapshot adopt web --dry-run", "which snapshots of VMware would be registered"),),
    "snapshot revert": (
        ("snapshot revert web before-upgrade", "what was written since is kept in its file"),
        ("snapshot revert web --current --discard --running", "a clean start from the newest snapshot"),
    ),
    "snapshot delete": (
        ("snapshot delete web before-upgrade --dry-run", "every operation on files, and nothing is changed"),
        ("snapshot delete web before-upgrade", "all other snapshots, and the domain, keep their contents"),
    ),
    "snapshot prune": (
        ("snapshot prune web --keep-hourly 24 --keep-daily 7 --explain --dry-run", "what stays, and why"),
        ("snapshot prune web --keep-last 3", "for a timer"),
    ),
    "snapshot current": (("snapshot current web before-upgrade", "the next snapshot is its child"),),
    "snapshot rename": (("snapshot rename web s1 before-upgrade", "files and tree stay"),),
    "snapshot describe": (("snapshot describe web s1 'before the upgrade'", "another description"),),
    "snapshot clone": (
        ("snapshot clone web before-upgrade web-test", "a domain on an overlay of what the snapshot froze"),
        ("snapshot clone web before-upgrade web-copy --full --dir /srv/images", "the same as a copy elsewhere"),
        ("snapshot clone web web2", "a copy of a domain that is shut off"),
    ),
    "snapshot destroy": (
        ("snapshot destroy web-test --storage --dry-run", "what would be deleted, and what stays"),
        ("snapshot destroy web-test --storage", "undefine the domain, and delete its files"),
    ),
    "snapshot move": (
        ("snapshot move web /srv/fast --dry-run", "which files would be renamed, and which bytes copied"),
        ("snapshot move web /srv/fast", "the XML of the domain and its snapshots follows"),
    ),
    "snapshot consolidate": (("snapshot consolidate web --dry-run", "does the domain need it?"),),
    "guest boot": (("guest boot top.vmdk crc 0 4096", "what a guest reads in the first 4096 bytes"),),
    "guest verify": (("guest verify top.vmdk", "does a guest read what the engine reads?"),),
    "guest linux": (("guest linux", "for tests that boot a Linux; made once, from the distribution's packages"),),
    "serve attach": (("serve attach web vda", "from the next start of web on"),),
    "serve detach": (("serve detach web vda", "QEMU opens the files of the disk itself again"),),
    "serve start": (("serve start web", "before the domain is started without the hook"),),
    "serve stop": (("serve stop web", "once the domain is shut off"),),
    "serve status": (("serve status web", "which disks are served, and by which process"),),
    "hook install": (("hook install", "as root: policies are in /etc/qemu-vmdk-snap/domains"),),
    "hook uninstall": (("hook uninstall", "policies stay"),),
    "hook status": (("hook status", "is it installed, and is every policy valid?"),),
    "hook after-stop": (("hook after-stop web", "what the hook runs when the guest has stopped"),),
    "recover": (
        ("recover /var/lib/libvirt/images", "operations on the images of a folder"),
        ("recover -c qemu:///system --domains", "operations on domains"),
    ),
    "doctor": (
        ("doctor", "this host"),
        ("doctor web", "one domain, its snapshots, and what was left behind"),
        ("doctor --all --output=json", "every domain, for a monitor"),
    ),
    "serve": (
        ("serve top.vmdk --socket /run/vm/top.sock", "to any NBD client; snapshots by its control socket"),
        ("serve top.vmdk --socket /run/vm/top.sock --read-only", "to look into it, or to copy it"),
    ),
    "metrics": (
        ("metrics", "every domain, in Prometheus' text format"),
        ("metrics --textfile /var/lib/prometheus/node-exporter/qemu_vmdk_snap.prom", "for node_exporter, from a timer"),
    ),
    "monitor": (
        ("monitor age -w 7d -c 30d", "WARNING where a domain has a snapshot that is older than a week"),
        ("monitor age web --newest -w 26h -c 50h", "has the nightly snapshot been made?"),
        ("monitor doctor", "CRITICAL where a finding is bad"),
    ),
    "demo": (("demo --keep /tmp/demo", "and look at the images afterwards"),),
    "completion": (
        ("completion bash >~/.local/share/bash-completion/completions/qemu-vmdk-snap", "for bash"),
        ("completion zsh >~/.zfunc/_qemu-vmdk-snap", "for zsh, with ~/.zfunc in fpath"),
        ("completion fish >~/.config/fish/completions/qemu-vmdk-snap.fish", "for fish"),
    ),
    "manual": (("manual ~/.local/share/man/man1", "then `man qemu-vmdk-snap`"),),
}


def as_text(prog: str) -> str:
    """Return the examples of the command `prog` (with the program's name) as its help shows them."""
    program, _, words = prog.partition(" ")
    lines = [f"  {program} {line}\n      {why}" for line, why in EXAMPLES.get(words, ())]
    return "\n".join(["examples:", *lines]) if lines else ""
