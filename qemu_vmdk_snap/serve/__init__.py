"""A server of VMDK chains over NBD: QEMU sees a raw disk, and what QEMU's vmdk driver refuses becomes possible.

    client --- socket --- Connection --- Disk --- Stack --- links of the chain
                          (a thread)     (one     (one lock, one log of grains)
                                         export)

One process and plain threads: each connection has one, which takes as many requests as one `recv` gives, does them
under the one lock of the stack, and sends all replies at once. Programs control it by a second socket (`control`).
"""
