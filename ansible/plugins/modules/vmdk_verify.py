#!/usr/bin/python
"""Boots a small guest on a chain and checks what it reads."""

DOCUMENTATION = r"""
module: vmdk_verify
short_description: Prove by booting a guest that it reads what a chain stores
description:
  - Boots the probe guest of the program in QEMU on a throw-away overlay of the image.
  - What it reads is compared with what the engine reads, or with an earlier record.
extends_documentation_fragment:
  - qemu_vmdk_snap.vmdk.program
options:
  path:
    description: The top of the chain.
    type: path
    required: true
  controller:
    description: The disk controller of the guest.
    type: str
  samples:
    description: How many places of each hole are read.
    type: int
    default: 8
  record:
    description: A file that gets the checksums of what the guest read.
    type: path
  against:
    description: A record of an earlier run, which the guest is to read again.
    type: path
  allow_dirs:
    description: Further folders in which parents and extents may lie.
    type: list
    elements: path
    default: []
attributes:
  check_mode:
    description: The guest boots in either mode; it changes nothing. No record is written in check mode.
    support: full
  diff_mode:
    description: Nothing is changed.
    support: none
"""

EXAMPLES = r"""
- name: Does a guest read what the chain stores?
  qemu_vmdk_snap.vmdk.vmdk_verify:
    path: /var/lib/libvirt/images/web1.vmdk
"""

RETURN = r"""
identical:
  description: Whether the guest read everywhere what was expected; the module fails where it did not.
  returned: when the guest has booted
  type: bool
report:
  description: The report of C(qemu-vmdk-snap guest verify).
  returned: when the guest has booted
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
    absolute,
)


def main():
    """Run the module."""
    module = AnsibleModule(
        argument_spec=dict(
            path=dict(type="path", required=True),
            controller=dict(type="str"),
            samples=dict(type="int", default=8),
            record=dict(type="path"),
            against=dict(type="path"),
            allow_dirs=dict(type="list", elements="path", default=[]),
            **PROGRAM_ARGUMENTS,
        ),
        supports_check_mode=True,
    )
    program = Program(module)
    words = ["guest", "verify", f"--samples={module.params['samples']}"]
    for folder in module.params["allow_dirs"]:
        words += ["--allow-dir", folder]
    if module.params["controller"]:
        words += ["--controller", module.params["controller"]]
    if module.params["record"] and not module.check_mode:
        words += ["--record", absolute(module.params["record"])]
    if module.params["against"]:
        words += ["--against", absolute(module.params["against"])]
    try:
        report = program.call(*([*words, absolute(module.params["path"])]), connect=False, accept=(0, 1))
    except Failed as failed:
        program.fail(failed)
    identical = program.status == 0
    written = bool(module.params["record"])
    if not identical:
        module.fail_json(
            msg="a guest reads from {} what was not expected".format(module.params["path"]),
            code="guest",
            exit_status=1,
            identical=False,
            report=report,
        )
    module.exit_json(changed=written, identical=True, report=report)


if __name__ == "__main__":
    main()
