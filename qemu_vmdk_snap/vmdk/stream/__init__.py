"""streamOptimized extents: compressed grains between markers."""
