#!/usr/bin/python
"""Deletes the snapshots that a policy does not keep."""

DOCUMENTATION = r"""
module: vmdk_snapshot_prune
short_description: Delete the snapshots that a policy does not keep
description:
  - Keeps the newest snapshots, and the newest of each hour, day, week and month, as far back as is asked for.
  - A snapshot that cannot be deleted is left as it was. The others are deleted, and the module fails then.
extends_documentation_fragment:
  - qemu_vmdk_snap.vmdk.program
  - qemu_vmdk_snap.vmdk.program.domain
options:
  keep_last:
    description: Keep so many of the newest.
    type: int
    default: 0
  keep_hourly:
    description: Keep the newest of each of so many hours that have a snapshot.
    type: int
    default: 0
  keep_daily:
    description: Keep the newest of each of so many days.
    type: int
    default: 0
  keep_weekly:
    description: Keep the newest of each of so many weeks.
    type: int
    default: 0
  keep_monthly:
    description: Keep the newest of each of so many months.
    type: int
    default: 0
  orphans:
    description: Files that need what is deleted, and are given up.
    type: list
    elements: path
    default: []
attributes:
  check_mode:
    description: The plan of the program's own dry run; nothing is changed.
    support: full
  diff_mode:
    description: The names of the snapshots.
    support: full
"""

EXAMPLES = r"""
- name: A week of days, a month of weeks
  qemu_vmdk_snap.vmdk.vmdk_snapshot_prune:
    name: web1
    keep_daily: 7
    keep_weekly: 4
"""

RETURN = r"""
deleted:
  description: The names of the snapshots that were deleted, or would be in check mode.
  returned: success
  type: list
  elements: str
kept:
  description: By the name of each snapshot that stays, the rules that keep it.
  returned: success
  type: dict
code:
  description: The program's frozen code of the error.
  returned: failure
  type: str
exit_status:
  description: The exit status of the program.
  returned: failure
  type: int
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.qemu_vmdk_snap.vmdk.plugins.module_utils.program import (
    PROGRAM_ARGUMENTS,
    Failed,
    Program,
    domain_arguments,
    the_domain,
)

RULES = ("last", "hourly", "daily", "weekly", "monthly")


def main():
    """Run the module."""
    rules = dict(("keep_" + rule, dict(type="int", default=0)) for rule in RULES)
    module = AnsibleModule(
        argument_spec=dict(
            orphans=dict(type="list", elements="path", default=[]),
            **dict(dict(domain_arguments(), **rules), **PROGRAM_ARGUMENTS),
        ),
        supports_check_mode=True,
    )
    program = Program(module)
    words = ["snapshot", "prune", the_domain(module)]
    words += [f"--keep-{rule}={module.params['keep_' + rule]}" for rule in RULES]
    for path in module.params["orphans"]:
        words += ["--orphan", path]
    if module.check_mode:
        words.append("--dry-run")
    try:
        answer = program.call(*words)
    except Failed as failed:
        program.fail(failed)
    deleted = [one["snapshot"] for one in answer["deleted"]]
    names = [one["name"] for one in answer["snapshots"]]
    module.exit_json(
        changed=bool(deleted),
        deleted=deleted,
        kept=dict((one["name"], one["kept-by"]) for one in answer["snapshots"] if one["name"] not in deleted),
        diff=dict(
            before=dict(snapshots=sorted(names)),
            after=dict(snapshots=sorted(name for name in names if name not in deleted)),
        ),
    )


if __name__ == "__main__":
    main()
