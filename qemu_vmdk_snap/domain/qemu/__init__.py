"""A running QEMU: its monitor, its guest agent, its block graph."""
