"""What an interrupted operation, and a killed server, leave to whoever comes next."""
