"""The VMDK format: bytes to records and back, the descriptor, and one file for each kind of extent."""
