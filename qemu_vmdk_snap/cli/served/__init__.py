"""The commands about served disks of domains; `serve` itself serves one image."""
