#!/usr/bin/python
"""Snapshots of one domain: present, absent, reverted, all removed."""

DOCUMENTATION = r"""
module: vmdk_snapshot
short_description: Create, revert to, rename and delete snapshots of a domain's VMDK disks
description:
  - Brings the snapshots of a libvirt domain with VMDK disks to the state that is asked for.
  - Parameters and results are those of VMware's C(vmware_guest_snapshot), so that a playbook for it runs with this
    module's name and a host of libvirt as its target.
  - Snapshots that something else needs are refused, not deleted; the failure has the program's code and exit status.
extends_documentation_fragment:
  - qemu_vmdk_snap.vmdk.program
  - qemu_vmdk_snap.vmdk.program.domain
options:
  state:
    description:
      - V(present) creates the snapshot unless there is one of that name. It also renames and describes.
      - V(absent) deletes it. All other snapshots keep their contents.
      - V(reverted), or VMware's word V(revert), returns the domain to it. What was written since is kept in its file,
        unless O(discard) is set. A domain that is shut off and has written nothing since is left as it is.
      - V(remove_all) deletes every snapshot of the domain.
    type: str
    choices: [present, absent, reverted, revert, remove_all]
    default: present
  snapshot_name:
    description: Name of the snapshot. Needed unless O(state=remove_all).
    type: str
  snapshot_id:
    description:
      - Number of the snapshot among those of the domain by their time of creation, as the results have it.
      - An alternative to O(snapshot_name) for V(absent) and V(reverted).
    type: int
  description:
    description: Description of a snapshot that is created.
    type: str
    default: ""
  new_snapshot_name:
    description: Name that the snapshot is to have from now on.
    type: str
  new_description:
    description: Description that the snapshot is to have from now on.
    type: str
  quiesce:
    description:
      - V(true) freezes the file systems of a running guest by its agent and fails where that cannot be; V(auto) tries.
    type: str
    default: "no"
  memory_dump:
    description:
      - Saves the memory of a running guest too. This is possible where all disks are served.
      - Elsewhere the module fails.
    type: bool
    default: false
  memory_file:
    description: Where the memory goes. Without it a file under C(/var/lib/libvirt/qemu/save).
    type: path
  remove_children:
    description: With O(state=absent), deletes the descendants of the snapshot too.
    type: bool
    default: false
  exclude:
    description: Disks, by target or file, that take no part in a snapshot that is created.
    type: list
    elements: str
    default: []
  after:
    description: What the domain is to be after a revert.
    type: str
    choices: [as-saved, shutoff, running, paused]
    default: as-saved
  discard:
    description: With O(state=reverted), deletes what was written since the last snapshot.
    type: bool
    default: false
  orphans:
    description: Files that need what is deleted, and are given up. Each is named; there is no general force.
    type: list
    elements: path
    default: []
attributes:
  check_mode:
    description: The plan of the program's own dry run; nothing is changed.
    support: full
  diff_mode:
    description: The names of the snapshots, and which is the current one.
    support: full
"""

EXAMPLES = r"""
- name: Before the update, two domains at a time
  qemu_vmdk_snap.vmdk.vmdk_snapshot:
    name: "{{ item }}"
    snapshot_name: before-update
    description: nightly update
    quiesce: auto
  loop: "{{ domains }}"
  throttle: 2

- name: Return to it
  qemu_vmdk_snap.vmdk.vmdk_snapshot:
    name: web1
    state: reverted
    snapshot_name: before-update
    after: running

- name: Delete it and what was made after it
  qemu_vmdk_snap.vmdk.vmdk_snapshot:
    name: web1
    state: absent
    snapshot_name: before-update
    remove_children: true
"""

RETURN = r"""
snapshot_results:
  description: The snapshots of the domain afterwards, as VMware's modules return them.
  returned: success
  type: dict
  sample:
    current_snapshot: {id: 1, name: before-update, description: "", creation_time: "2026-01-01T00:00:00+00:00"}
    snapshots: [{id: 1, name: before-update, description: "", creation_time: "2026-01-01T00:00:00+00:00"}]
actions:
  description: The answers of the program to what was done, or would be done in check mode.
  returned: success
  type: list
  elements: dict
code:
  description: The program's frozen code of the error, V(no-domain), V(locked) or V(still-needed) for instance.
  returned: failure
  type: str
exit_status:
  description: The exit status of the program.
  returned: failure
  type: int
error:
  description: The program's whole error object.
  returned: failure
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.qemu_vmdk_snap.vmdk.plugins.module_utils.program import (
    PROGRAM_ARGUMENTS,
    Failed,
    Program,
    as_results,
    domain_arguments,
    the_domain,
)

_QUIESCE = {"true": "require", "yes": "require", "false": "no"}


class Work:
    """What one task does."""

    def __init__(self, module):
        """Read what there is."""
        self.module, self.params = module, module.params
        self.program = Program(module)
        self.domain = the_domain(module)
        self.actions = []
        self.before = self.list()

    def list(self):
        """Return the snapshots of the domain as the program lists them."""
        return self.program.call("snapshot", "list", self.domain)

    def do(self, *words):
        """Run a command that changes something; in check mode its dry run."""
        more = ["--dry-run"] if self.module.check_mode else []
        self.actions.append(self.program.call("snapshot", *(list(words) + more)))

    def edit(self, *words):
        """Run a command that only changes what libvirt has registered, and has no dry run."""
        if not self.module.check_mode:
            self.program.call("snapshot", *words)
        self.actions.append(dict(edit=words[0], snapshot=words[2]))

    def wanted(self):
        """Return the snapshot that is meant, or None; and its name, as far as it is known."""
        if self.params["snapshot_name"]:
            name = self.params["snapshot_name"]
            return next((one for one in self.before if one["name"] == name), None), name
        rows = as_results(self.before)["snapshots"]
        name = next((row["name"] for row in rows if row["id"] == self.params["snapshot_id"]), None)
        return next((one for one in self.before if one["name"] == name), None), name


def present(work):
    """Create, rename and describe; return the names expected afterwards."""
    found, name = work.wanted()
    params = work.params
    names = [one["name"] for one in work.before]
    new = params["new_snapshot_name"]
    current = next((one["name"] for one in work.before if one["current"]), None)
    if found is None and new in names:
        found, name = next(one for one in work.before if one["name"] == new), new  # renamed by an earlier run
    elif found is None:
        words = ["create", work.domain, name]
        if params["new_description"] or params["description"]:
            words += ["--description", params["new_description"] or params["description"]]
        quiesce = params["quiesce"].lower()
        words.append("--quiesce=" + _QUIESCE.get(quiesce, quiesce))
        for disk in params["exclude"]:
            words += ["--diskspec", disk.replace(",", ",,") + ",snapshot=no"]
        if params["memory_dump"]:
            file = params["memory_file"] or f"/var/lib/libvirt/qemu/save/{work.domain}.{name}.mem"
            words += ["--memspec", file]
        try:
            work.do(*words)
        except Failed as failed:
            if failed.code != "snapshot-exists":
                raise
            # A create that was interrupted has been finished first, or another controller was quicker.
            work.before = work.list()
        names, current = [*names, name], name
    elif params["new_description"] is not None and (found["description"] or "") != params["new_description"]:
        work.edit("describe", work.domain, name, params["new_description"])
    if new is not None and new != name:
        work.edit("rename", work.domain, name, new)
        names = [new if one == name else one for one in names]
        current = new if current == name else current
    return names, current


def absent(work):
    """Delete the snapshot, with its descendants if they are to go."""
    found, name = work.wanted()
    names = [one["name"] for one in work.before]
    current = next((one["name"] for one in work.before if one["current"]), None)
    if found is None:
        return names, current
    words = ["delete", work.domain, name] + (["--children"] if work.params["remove_children"] else [])
    for path in work.params["orphans"]:
        words += ["--orphan", path]
    work.do(*words)
    gone = [name]
    if work.params["remove_children"]:
        for one in sorted(work.before, key=lambda one: one["creation-time"]):
            if one["parent"] in gone and one["name"] not in gone:
                gone.append(one["name"])
    if current in gone:
        current = found["parent"]
    return [one for one in names if one not in gone], current


def reverted(work):
    """Return to the snapshot, unless the domain is there."""
    found, name = work.wanted()
    names = [one["name"] for one in work.before]
    if found is None:
        shown = name if name is not None else "with the id {}".format(work.params["snapshot_id"])
        message = f"domain {work.domain}: has no snapshot {shown}"
        raise Failed({"class": "NoSnapshot", "code": "no-snapshot", "message": message, "exit-status": 69}, [])
    words = ["revert", work.domain, name]
    if work.params["after"] != "as-saved":
        words.append("--" + work.params["after"])
    if work.params["discard"]:
        words.append("--discard")
    for path in work.params["orphans"]:
        words += ["--orphan", path]
    plan = work.program.call(*(["snapshot", *words, "--dry-run"]))
    if plan.get("already"):
        return names, name
    if work.module.check_mode:
        work.actions.append(plan)
    else:
        work.do(*words)
    return names, name


def remove_all(work):
    """Delete every snapshot, root by root."""
    names = set(one["name"] for one in work.before)
    for one in work.before:
        if one["parent"] not in names:
            work.do("delete", work.domain, one["name"], "--children")
    return [], None


def main():
    """Run the module."""
    module = AnsibleModule(
        argument_spec=dict(
            state=dict(
                type="str", default="present", choices=["present", "absent", "reverted", "revert", "remove_all"]
            ),
            snapshot_name=dict(type="str"),
            snapshot_id=dict(type="int"),
            description=dict(type="str", default=""),
            new_snapshot_name=dict(type="str"),
            new_description=dict(type="str"),
            quiesce=dict(type="str", default="no"),
            memory_dump=dict(type="bool", default=False),
            memory_file=dict(type="path"),
            remove_children=dict(type="bool", default=False),
            exclude=dict(type="list", elements="str", default=[]),
            after=dict(type="str", default="as-saved", choices=["as-saved", "shutoff", "running", "paused"]),
            discard=dict(type="bool", default=False),
            orphans=dict(type="list", elements="path", default=[]),
            **dict(domain_arguments(), **PROGRAM_ARGUMENTS),
        ),
        required_if=[
            ("state", "present", ["snapshot_name"]),
            ("state", "absent", ["snapshot_name", "snapshot_id"], True),
            ("state", "reverted", ["snapshot_name", "snapshot_id"], True),
            ("state", "revert", ["snapshot_name", "snapshot_id"], True),
        ],
        mutually_exclusive=[("snapshot_name", "snapshot_id")],
        supports_check_mode=True,
    )
    program = None
    try:
        work = Work(module)
        program = work.program
        steps = dict(present=present, absent=absent, reverted=reverted, revert=reverted, remove_all=remove_all)
        names, current = steps[module.params["state"]](work)
        after = work.before if module.check_mode or not work.actions else work.list()
    except Failed as failed:
        (program or Program(module)).fail(failed)
    if not module.check_mode:
        names = [one["name"] for one in after]
        current = next((one["name"] for one in after if one["current"]), None)
    was = next((one["name"] for one in work.before if one["current"]), None)
    module.exit_json(
        changed=bool(work.actions),
        actions=work.actions,
        snapshot_results=as_results(after),
        diff=dict(
            before=dict(snapshots=sorted(one["name"] for one in work.before), current=was),
            after=dict(snapshots=sorted(names), current=current),
        ),
    )


if __name__ == "__main__":
    main()
