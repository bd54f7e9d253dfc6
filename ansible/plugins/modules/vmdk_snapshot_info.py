#!/usr/bin/python
"""The snapshots of a domain, or of all."""

DOCUMENTATION = r"""
module: vmdk_snapshot_info
short_description: List the snapshots of a domain's VMDK disks
description:
  - Returns the snapshots of one domain, as VMware's C(vmware_guest_snapshot_info) does.
  - Without a domain it returns those of every domain of a host.
extends_documentation_fragment:
  - qemu_vmdk_snap.vmdk.program
  - qemu_vmdk_snap.vmdk.program.domain
attributes:
  check_mode:
    description: Nothing is changed in either mode.
    support: full
  diff_mode:
    description: Nothing is changed.
    support: none
"""

EXAMPLES = r"""
- name: The snapshots of one domain
  qemu_vmdk_snap.vmdk.vmdk_snapshot_info:
    name: web1
  register: web1

- name: The snapshots of all
  qemu_vmdk_snap.vmdk.vmdk_snapshot_info:
  register: all
"""

RETURN = r"""
guest_snapshots:
  description: The snapshots of the domain that was named, with its current one.
  returned: when a domain is named
  type: dict
domains:
  description: By the name of the domain, its snapshots; or the C(error) that it gives.
  returned: when no domain is named
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
    all_domains,
    as_results,
    domain_arguments,
    the_domain,
)


def main():
    """Run the module."""
    module = AnsibleModule(argument_spec=dict(domain_arguments(), **PROGRAM_ARGUMENTS), supports_check_mode=True)
    program = Program(module)
    try:
        if module.params["name"] or module.params["uuid"]:
            snapshots = program.call("snapshot", "list", the_domain(module))
            module.exit_json(changed=False, guest_snapshots=as_results(snapshots))
        domains = all_domains(program)
    except Failed as failed:
        program.fail(failed)
    module.exit_json(changed=False, domains=domains)


if __name__ == "__main__":
    main()
