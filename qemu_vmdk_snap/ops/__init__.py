"""Whole-image and whole-chain operations, one file and one public function each."""
