"""What all kinds of extents that are made of grains share: tables, reading, copy-on-write, filling a new one."""
