"""The command line: parse, call, show. Nothing below this package prints, prompts or exits."""
