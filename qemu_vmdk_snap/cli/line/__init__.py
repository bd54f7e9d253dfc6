"""The words of a command line: sorted, parsed plainly where they are in order, by argparse where not."""
