"""The commands for monitoring: metrics for Prometheus, and a plugin for Nagios and compatible systems."""
