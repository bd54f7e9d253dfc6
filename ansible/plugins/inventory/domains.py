"""An inventory of domains: each domain of some hypervisors is a host."""

DOCUMENTATION = r"""
name: domains
short_description: The domains of hypervisors that have the program installed
description:
  - Asks each hypervisor for its domains and their snapshots, by SSH or on this machine.
  - A domain becomes a host of its own name, with C(vmdk_hypervisor), C(vmdk_domain) and C(vmdk_snapshots). Where two
    hypervisors have domains of one name, the hosts are called C(NAME.HYPERVISOR).
  - Groups are C(has_vmdk) for domains that have snapshots, C(snapshot_older_than_N) for each number of days of
    O(older_than_days), C(vmdk_unreadable) for domains that cannot be read, and C(on_HYPERVISOR).
  - A hypervisor that does not answer is left out with a warning, unless O(strict) is set.
author:
  - The qemu-vmdk-snap developers (@qemu-vmdk-snap)
extends_documentation_fragment:
  - constructed
options:
  plugin:
    description: Must be V(qemu_vmdk_snap.vmdk.domains).
    required: true
    choices: [qemu_vmdk_snap.vmdk.domains]
  hypervisors:
    description:
      - The hypervisors, as C(ssh) takes them. V(localhost) is this machine, without SSH.
    type: list
    elements: str
    required: true
  connect:
    description: The libvirt connection on each of them.
    type: str
  executable:
    description: The program on each of them.
    type: str
    default: qemu-vmdk-snap
  ssh_options:
    description: Options of C(ssh).
    type: list
    elements: str
    default: [-o, BatchMode=yes, -o, ConnectTimeout=10]
  timeout:
    description: How many seconds a hypervisor has to answer.
    type: int
    default: 120
  older_than_days:
    description: The numbers of days that there is a group for.
    type: list
    elements: int
    default: [7, 30]
"""

EXAMPLES = r"""
# domains.vmdk_snap.yml
plugin: qemu_vmdk_snap.vmdk.domains
hypervisors: [root@hv1, root@hv2]
older_than_days: [3, 30]
"""

import json
import shlex
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

from ansible.errors import AnsibleParserError

from ansible.plugins.inventory import BaseInventoryPlugin, Constructable


class InventoryModule(BaseInventoryPlugin, Constructable):
    """The plugin."""

    NAME = "qemu_vmdk_snap.vmdk.domains"

    def verify_file(self, path):
        """Return whether the file is for this plugin."""
        return super().verify_file(path) and path.endswith(("vmdk_snap.yml", "vmdk_snap.yaml"))

    def parse(self, inventory, loader, path, cache=True):
        """Ask all hypervisors at once and add what they say."""
        super().parse(inventory, loader, path, cache)
        self._read_config_data(path)
        hypervisors = self.get_option("hypervisors")
        with ThreadPoolExecutor(max_workers=max(1, min(16, len(hypervisors)))) as pool:
            answers = list(pool.map(self._ask, hypervisors))
        rows = []
        for hypervisor, (domains, problem) in zip(hypervisors, answers, strict=False):
            if problem is not None:
                if self.get_option("strict"):
                    raise AnsibleParserError(f"{hypervisor}: {problem}")
                self.display.warning(f"{hypervisor} is left out: {problem}")
            rows += [(hypervisor, one) for one in domains]
        names = [one["domain"] for _, one in rows]
        for hypervisor, one in rows:
            short = hypervisor.rpartition("@")[2]
            name = one["domain"] if names.count(one["domain"]) == 1 else "{}.{}".format(one["domain"], short)
            self._add(name, short, hypervisor, one)

    def _add(self, name, short, hypervisor, one):
        self.inventory.add_host(name)
        snapshots = one.get("snapshots", [])
        variables = dict(vmdk_hypervisor=hypervisor, vmdk_domain=one["domain"], vmdk_snapshots=snapshots)
        for key, value in variables.items():
            self.inventory.set_variable(name, key, value)
        groups = ["on_" + short]
        if "error" in one:
            groups.append("vmdk_unreadable")
            self.inventory.set_variable(name, "vmdk_error", one["error"])
        if snapshots:
            groups.append("has_vmdk")
            oldest = min(snapshot["creation-time"] for snapshot in snapshots)
            days = (time.time() - oldest) / 86400
            groups += [f"snapshot_older_than_{limit}" for limit in self.get_option("older_than_days") if days > limit]
        for group in groups:
            self.inventory.add_host(name, group=self.inventory.add_group(self._sanitized(group)))
        strict = self.get_option("strict")
        self._set_composite_vars(self.get_option("compose"), variables, name, strict=strict)
        self._add_host_to_composed_groups(self.get_option("groups"), variables, name, strict=strict)
        self._add_host_to_keyed_groups(self.get_option("keyed_groups"), variables, name, strict=strict)

    def _sanitized(self, group):
        return "".join(letter if letter.isalnum() else "_" for letter in group)

    def _ask(self, hypervisor):
        """Return the domains of the hypervisor, and why there are none, or None."""
        words = [self.get_option("executable"), "snapshot", "list", "--all", "--output=json"]
        if self.get_option("connect"):
            words += ["--connect", self.get_option("connect")]
        if hypervisor != "localhost":
            if hypervisor.startswith("-"):
                return [], "cannot be the name of a host"
            remote = " ".join(shlex.quote(word) for word in words)
            words = ["ssh", *self.get_option("ssh_options"), "--", hypervisor, remote]
        try:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=self.get_option("timeout"),
                check=False,
            )
            answer = json.loads(done.stdout.decode("utf-8", "replace") or "null")
        except (OSError, subprocess.TimeoutExpired, ValueError) as error:
            return [], str(error)
        if isinstance(answer, list):  # one domain may have an error of its own
            return answer, None
        if isinstance(answer, dict) and "error" in answer:
            return [], answer["error"]["message"]
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        return [], lines[-1] if lines else f"ended with status {done.returncode} and no answer"
