"""Who needs a file: what every file says that it needs, asked before anything is destroyed."""
