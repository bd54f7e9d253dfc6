"""The in-process libvirt and the private daemon of the domain tests, with probes inside."""

from tests.domain.conftest import daemon, embed, embed_uri

__all__ = ["daemon", "embed", "embed_uri"]
