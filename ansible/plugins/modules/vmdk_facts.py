#!/usr/bin/python
"""Facts about the VMDK snapshots of a host."""

DOCUMENTATION = r"""
module: vmdk_facts
short_description: Gather facts about the VMDK snapshots of a host
description:
  - Sets the fact C(qemu_vmdk_snap), with the program's version and the snapshots of every domain.
extends_documentation_fragment:
  - qemu_vmdk_snap.vmdk.program
attributes:
  check_mode:
    description: Nothing is changed in either mode.
    support: full
  diff_mode:
    description: Nothing is changed.
    support: none
"""

EXAMPLES = r"""
- name: Facts
  qemu_vmdk_snap.vmdk.vmdk_facts:

- name: Domains that have snapshots
  ansible.builtin.debug:
    msg: "{{ ansible_facts.qemu_vmdk_snap.domains | dict2items | selectattr('value.snapshots', 'defined') }}"
"""

RETURN = r"""
ansible_facts:
  description: The facts.
  returned: success
  type: dict
  contains:
    qemu_vmdk_snap:
      description: The C(version) of the program, and by the name of each domain its snapshots or its C(error).
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
)


def main():
    """Run the module."""
    module = AnsibleModule(argument_spec=dict(PROGRAM_ARGUMENTS), supports_check_mode=True)
    program = Program(module)
    try:
        domains = all_domains(program)
    except Failed as failed:
        program.fail(failed)
    facts = dict(version=program.version(), domains=domains)
    module.exit_json(changed=False, ansible_facts=dict(qemu_vmdk_snap=facts))


if __name__ == "__main__":
    main()
