"""Configs: defaults, checks, and features of own logs."""
