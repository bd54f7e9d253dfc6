"""The control socket: what programs can ask of a server, and the work that is done for it."""
