"""libvirt's hook: applies a domain's policy at each start and stop."""
