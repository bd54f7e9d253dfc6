"""libvirt's hook: what a domain's policy asks for at each start and stop."""
