"""streamOptimized extents: compressed grains behind markers."""
