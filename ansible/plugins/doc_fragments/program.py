"""Documentation that all modules share."""


class ModuleDocFragment:
    """The options of every module."""

    DOCUMENTATION = r"""
options:
  connect:
    description:
      - The libvirt connection on the host, as C(virsh -c) takes it.
      - Without it libvirt's own choice is taken, C(qemu:///system) for root.
    type: str
    aliases: [uri]
  executable:
    description:
      - The program on the host, by name or path.
      - A name is also looked for in C(/usr/local/bin) and C(/opt/qemu-vmdk-snap/bin).
    type: path
    default: qemu-vmdk-snap
requirements:
  - qemu-vmdk-snap on the host; the role C(qemu_vmdk_snap.vmdk.host) installs it
author:
  - The qemu-vmdk-snap developers (@qemu-vmdk-snap)
attributes:
  platform:
    description: The program runs on Linux hosts with libvirt and QEMU.
    support: full
    platforms: linux
"""

    DOMAIN = r"""
options:
  name:
    description:
      - Name of the domain. One of O(name) and O(uuid) is needed.
    type: str
    aliases: [domain, guest, vm_name]
  uuid:
    description:
      - UUID of the domain; it is taken rather than the name.
    type: str
  hostname:
    description: Means nothing to libvirt. Accepted so that a playbook for VMware runs; named in one warning.
    type: str
  username:
    description: See O(hostname).
    type: str
    aliases: [admin, user]
  password:
    description: See O(hostname).
    type: str
    aliases: [pass, pwd]
  port:
    description: See O(hostname).
    type: int
  validate_certs:
    description: See O(hostname).
    type: bool
  proxy_host:
    description: See O(hostname).
    type: str
  proxy_port:
    description: See O(hostname).
    type: int
  datacenter:
    description: See O(hostname).
    type: str
  folder:
    description: See O(hostname).
    type: str
  moid:
    description: See O(hostname).
    type: str
  name_match:
    description: See O(hostname).
    type: str
  use_instance_uuid:
    description: See O(hostname).
    type: bool
"""
