#!/usr/bin/python
"""What an image and its backing chain are."""

DOCUMENTATION = r"""
module: vmdk_image_info
short_description: Describe a VMDK image and its backing chain, and check it
description:
  - Returns what C(qemu-vmdk-snap image info) says of an image, and what C(image check) finds.
extends_documentation_fragment:
  - qemu_vmdk_snap.vmdk.program
options:
  path:
    description: The image.
    type: path
    required: true
  backing_chain:
    description: Describe every image of the chain.
    type: bool
    default: false
  check:
    description: Check the tables of the chain too.
    type: bool
    default: false
  force_share:
    description: Read an image that a guest is writing to.
    type: bool
    default: false
  allow_dirs:
    description: Further folders in which parents and extents may lie.
    type: list
    elements: path
    default: []
attributes:
  check_mode:
    description: Nothing is changed in either mode.
    support: full
  diff_mode:
    description: Nothing is changed.
    support: none
"""

EXAMPLES = r"""
- name: A chain, checked
  qemu_vmdk_snap.vmdk.vmdk_image_info:
    path: /var/lib/libvirt/images/web1-000003.vmdk
    backing_chain: true
    check: true
  register: image
  failed_when: image.check.status not in ["good", "leaks"]
"""

RETURN = r"""
images:
  description: The image, or every image of its chain, top first, with the keys of C(qemu-img info).
  returned: success
  type: list
  elements: dict
check:
  description: The report of the check, and its C(status), V(good), V(incomplete), V(corrupt) or V(leaks).
  returned: when O(check=true)
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

STATUS = {0: "good", 1: "incomplete", 2: "corrupt", 3: "leaks"}


def main():
    """Run the module."""
    module = AnsibleModule(
        argument_spec=dict(
            path=dict(type="path", required=True),
            backing_chain=dict(type="bool", default=False),
            check=dict(type="bool", default=False),
            force_share=dict(type="bool", default=False),
            allow_dirs=dict(type="list", elements="path", default=[]),
            **PROGRAM_ARGUMENTS,
        ),
        supports_check_mode=True,
    )
    program = Program(module)
    more = ["--force-share"] if module.params["force_share"] else []
    for folder in module.params["allow_dirs"]:
        more += ["--allow-dir", folder]
    path = absolute(module.params["path"])
    chain = ["--backing-chain"] if module.params["backing_chain"] else []
    try:
        found = program.call(*(["image", "info", *chain, *more, path]), connect=False)
        result = dict(images=found if isinstance(found, list) else [found])
        if module.params["check"]:
            words = ["image", "check", *more, path]
            report = program.call(*words, connect=False, accept=tuple(STATUS))
            result["check"] = dict(report, status=STATUS[program.status])
    except Failed as failed:
        program.fail(failed)
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
