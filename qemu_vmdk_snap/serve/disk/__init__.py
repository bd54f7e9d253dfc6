"""The disk that is served: its links, where each unit is, reading and writing it."""
