"""Who needs a file: looked up before a file is removed or changed."""
