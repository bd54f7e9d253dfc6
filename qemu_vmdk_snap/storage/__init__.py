"""Files as the engine sees them: the BlockFile port, image locks, durable creation, copying in the kernel."""
