"""What is made of the table of commands: completion scripts and manual pages."""
