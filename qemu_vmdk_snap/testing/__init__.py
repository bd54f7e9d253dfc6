"""Guests and libvirt domains for anybody's tests: `plugin` is the pytest plugin, `domains` works without pytest too."""
