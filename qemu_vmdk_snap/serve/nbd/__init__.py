"""The NBD protocol: handshake, requests, answers."""
