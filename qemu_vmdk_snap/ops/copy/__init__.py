"""Reading whole disks: copies, comparisons, deltas."""
