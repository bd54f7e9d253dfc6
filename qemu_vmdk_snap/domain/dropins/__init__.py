"""The user's own executables around an operation, and which of them are trusted."""
