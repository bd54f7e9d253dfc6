#!/usr/bin/python
"""Whether a host or its domains are sound."""

DOCUMENTATION = r"""
module: vmdk_doctor
short_description: Check a host, or domains and their snapshots, for problems
description:
  - Returns the findings of C(qemu-vmdk-snap doctor) for this host, one domain, or all of them.
extends_documentation_fragment:
  - qemu_vmdk_snap.vmdk.program
options:
  name:
    description: A domain. Without it, and without O(all), the host itself is checked.
    type: str
    aliases: [domain]
  all:
    description: Check every domain of the connection.
    type: bool
    default: false
  fail_on_bad:
    description: Fail where a finding is bad.
    type: bool
    default: true
attributes:
  check_mode:
    description: Nothing is changed in either mode.
    support: full
  diff_mode:
    description: Nothing is changed.
    support: none
"""

EXAMPLES = r"""
- name: Nothing is bad, on any domain
  qemu_vmdk_snap.vmdk.vmdk_doctor:
    all: true
"""

RETURN = r"""
good:
  description: Whether no finding is bad.
  returned: always, if the program answers
  type: bool
report:
  description: The answer of the program, with C(checks), or C(domains) that each have them.
  returned: always, if the program answers
  type: dict
bad:
  description: The findings that are bad, a line each.
  returned: always, if the program answers
  type: list
  elements: str
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
)


def bad_lines(report):
    """Return the bad findings, a line each."""
    lines = []
    for one in report.get("domains", [report]):
        about = "{}: ".format(one["domain"]) if "domain" in one else ""
        if "error" in one:
            lines.append(about + one["error"]["message"])
        for check in one.get("checks", []):
            if check["verdict"] == "bad":
                lines.append("{}{}: {}".format(about, check["subject"], check["text"]))
    return lines


def main():
    """Run the module."""
    module = AnsibleModule(
        argument_spec=dict(
            name=dict(type="str", aliases=["domain"]),
            all=dict(type="bool", default=False),
            fail_on_bad=dict(type="bool", default=True),
            **PROGRAM_ARGUMENTS,
        ),
        mutually_exclusive=[("name", "all")],
        supports_check_mode=True,
    )
    program = Program(module)
    words = ["--all"] if module.params["all"] else [module.params["name"]] if module.params["name"] else []
    try:
        report = program.call("doctor", *words, accept=(0, 1))
    except Failed as failed:
        program.fail(failed)
    bad = bad_lines(report)
    if bad and module.params["fail_on_bad"]:
        module.fail_json(msg=bad[0], code="bad-findings", exit_status=1, good=False, report=report, bad=bad)
    module.exit_json(changed=False, good=not bad, report=report, bad=bad)


if __name__ == "__main__":
    main()
