"""COWD extents: ESXi's sparse deltas."""
