"""Measures our commands against qemu-img's on the same images, in one run."""
